"""Embeds images: writes features, pids, camids, modality and paths to an .npz file for scripts/evaluate.py or NumPy.

python scripts/extract.py --workdir=runs/sysu --images=photos --out=photos.npz
python scripts/extract.py --weights=published.pth --images=list.txt --out=list.npz

Weights that carry no settings are taken for the paper's MPANet; --config names another network, as in
  --weights=se.pth --config=configs/sysu.py --config.model.channel_module=se

--images is a folder (with all folders below it; .jpg .jpeg .png .bmp .tif .tiff .webp .gif .ppm .pgm), a text file with
one path a line, relative to that file, or an images.csv (docs/data.md), of which --split chooses a part. Without a CSV,
pids, camids and modality are read from paths of the form of SYSU-MM01 (cam3/0007/0003.jpg), LLCM
(test_vis/cam3/0007/…) and RegDB (Visible/7/…, Thermal/7/…: cameras 1 and 2). For other paths they are -1. To add your
own before evaluating: np.savez("F.npz", **(dict(np.load("F.npz")) | {"pids": …, "camids": …})).

An image that cannot be read is named and left out, and the exit code is 1; --strict stops and writes nothing.

SYSU-MM01's queries are the test identities in cameras 3 and 6, its gallery those in 1, 2, 4 and 5. In its folder:
  for id in $(tr , ' ' < exp/test_id.txt); do ls cam[36]/$(printf %04d $id)/*.jpg; done > query.txt
  for id in $(tr , ' ' < exp/test_id.txt); do ls cam[1245]/$(printf %04d $id)/*.jpg; done > gallery.txt
then extract.py --images=SYSU-MM01/query.txt --out=query.npz …, the same for the gallery, and
  evaluate.py --features query.npz gallery.npz --protocol sysu_mm01 --permutation SYSU-MM01/exp/rand_perm_cam.mat
RegDB, in its folder: cut -d' ' -f1 idx/test_visible_1.txt > visible.txt, and the same for thermal.
"""

import sys
import time
from pathlib import Path

from absl import flags
from ml_collections import config_flags

from mpanet_jax.errors import UserError, run_script

WORKDIR = flags.DEFINE_string("workdir", None, "A training run: its last checkpoint, image size and precision.")
WEIGHTS = flags.DEFINE_string(
    "weights", None, "Or weights of a network: anything that scripts/convert_weights.py reads or writes."
)
CONFIG = config_flags.DEFINE_config_file(
    "config", None, "The network of --weights that carry no settings.", lock_config=True
)
IMAGES = flags.DEFINE_string(
    "images", None, "A folder, a text file with one path a line, or an images.csv.", required=True
)
SPLIT = flags.DEFINE_string("split", "", "A part of images.csv: train, val, test, query or gallery; default: all.")
MODALITY = flags.DEFINE_enum(
    "modality",
    None,
    ["visible", "infrared"],
    "Leave out images that are known to be of the other modality, and take unknown ones for images of this one.",
)
OUT = flags.DEFINE_string("out", None, "The .npz to write.", required=True)
HEIGHT = flags.DEFINE_integer("height", None, "Pixels after the resize; default: the run's, or 384.", lower_bound=16)
WIDTH = flags.DEFINE_integer("width", None, "Pixels after the resize; default: the run's, or 128.", lower_bound=16)
BATCH_SIZE = flags.DEFINE_integer("batch_size", None, "Images at once; default: the run's, or 256.", lower_bound=1)
DTYPE = flags.DEFINE_enum(
    "dtype", None, ["auto", "float32", "bfloat16"], "Precision; default: the run's, or auto (bfloat16 on accelerators)."
)
STRICT = flags.DEFINE_bool("strict", False, "Stop at the first image that cannot be read, and write nothing.")


def main(arguments: list[str]) -> int:
    if arguments:
        raise UserError(f"{arguments[0]}: not a flag; see --help")
    if bool(WORKDIR.value) == bool(WEIGHTS.value):
        raise UserError("expected one of --workdir and --weights")
    if WORKDIR.value and CONFIG.value is not None:
        raise UserError("--config goes with --weights; --workdir has the config of its run")
    if Path(OUT.value).suffix != ".npz" or Path(OUT.value).is_dir():
        raise UserError(f"--out={OUT.value}: expected the name of a file that ends in .npz")
    from mpanet_jax.embeddings import check_embeddings, save_embeddings
    from mpanet_jax.evaluation.given_images import UnreadableImage
    from mpanet_jax.evaluation.images import embeddings_of, keep_modality, list_images
    from mpanet_jax.methods import settings_of
    from mpanet_jax.modality import MODALITY_NAMES
    from mpanet_jax.model import Model, load
    from mpanet_jax.settings_base import replace

    images = list_images(IMAGES.value, split=SPLIT.value)
    if MODALITY.value:
        images = keep_modality(images, {name: number for number, name in MODALITY_NAMES.items()}[MODALITY.value])
    settings = settings_of(CONFIG.value.to_dict()) if CONFIG.value is not None else None
    model = load(WORKDIR.value or WEIGHTS.value, dtype=DTYPE.value, settings=settings)
    size = {f"data.{name}": flag.value for name, flag in (("height", HEIGHT), ("width", WIDTH)) if flag.value}
    model = Model(replace(model.settings, size), model.variables, model.source)
    options = {
        "modality": [image.modality for image in images],
        "normalize": False,
        "batch_size": BATCH_SIZE.value,
    }
    begin, skipped = time.perf_counter(), []
    try:
        if STRICT.value:
            features = model.embed([image.file for image in images], **options)
        else:
            features, skipped = model.embed([image.file for image in images], errors="skip", **options)
    except UnreadableImage as error:
        raise UserError(f"{error.image.name}: {error.image.reason}; nothing is written (--strict)") from error
    seconds = time.perf_counter() - begin
    for image in skipped:
        print(f"skipped {image.name}: {image.reason}", file=sys.stderr)
    try:
        save_embeddings(OUT.value, check_embeddings(embeddings_of(images, features, skipped)))
    except OSError as error:
        raise UserError(f"--out={OUT.value}: cannot be written ({error.strerror})") from error
    number, length = features.shape
    print(f"{OUT.value}: {number:,} images as vectors of {length:,}; {number / seconds:,.0f} images/s with compilation")
    if skipped:
        print(f"{len(skipped)} of {len(images)} images skipped", file=sys.stderr)
    return int(bool(skipped))


if __name__ == "__main__":
    run_script(main)
