"""Draws a synthetic data set in a real data set's on-disk layout.

python scripts/make_synthetic.py --layout sysu_mm01 --out data/raw/synthetic
python scripts/make_synthetic.py --scale bench --out data/raw/bench
python scripts/make_synthetic.py --layout sysu_mm01 --scale full --perm exp/rand_perm_cam.mat --out data/raw/full
python scripts/make_synthetic.py --contact_sheet docs/synthetic.jpg
"""

import os
import time

from absl import flags

from mpanet_jax.datasets.synthetic import write_contact_sheet, write_dataset
from mpanet_jax.errors import UserError, run_script
from mpanet_jax.progress import Bar

FLAGS = flags.FLAGS
flags.DEFINE_enum("layout", "sysu_mm01", ["sysu_mm01", "regdb", "llcm"], "The data set whose layout is written.")
flags.DEFINE_string("out", None, "The folder to make; it must not exist, or be empty.")
flags.DEFINE_integer("seed", 0, "The same seed gives byte-identical files.", lower_bound=0)
flags.DEFINE_enum(
    "scale",
    "small",
    ["small", "bench", "full"],
    "small: about 2,500 images; bench: 20,608 images of 491 identities, for the ablations; full: as many as the real "
    "data set has.",
)
flags.DEFINE_string("perm", None, "SYSU-MM01's rand_perm_cam.mat, whose numbers of images are taken (--scale full).")
flags.DEFINE_integer("workers", os.cpu_count(), "Processes that draw; 0 draws in this one.", lower_bound=0)
flags.DEFINE_string("contact_sheet", None, "Also write a picture of some of the people to this JPEG file.")


def main(argv: list[str]) -> None:
    if argv:
        raise UserError(f"{argv[0]}: not a flag; see --help")
    if not (FLAGS.out or FLAGS.contact_sheet):
        raise UserError("--out: expected the folder to make; for example --out data/raw/synthetic")
    if FLAGS.out:
        begin = time.perf_counter()
        with Bar("drawing", None) as bar:
            count = write_dataset(
                FLAGS.layout,
                FLAGS.out,
                seed=FLAGS.seed,
                scale=FLAGS.scale,
                permutation=FLAGS.perm,
                workers=FLAGS.workers,
                progress=lambda done, total: bar.update(done, total=total),
            )
        seconds = time.perf_counter() - begin
        print(f"{FLAGS.out}: {count:,} images in the layout of {FLAGS.layout}, {count / seconds:,.0f} images/s")
    if FLAGS.contact_sheet:
        write_contact_sheet(FLAGS.contact_sheet, seed=FLAGS.seed)


if __name__ == "__main__":
    run_script(main)
