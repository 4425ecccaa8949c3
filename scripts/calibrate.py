"""Calibrates a model's similarities: on pairs of half of the test identities, reported on those of the other half.

python scripts/calibrate.py --workdir=runs/sysu
python scripts/calibrate.py --workdir=runs/sysu --prior=0.01 --seed=1 --data_dir=data
python scripts/calibrate.py --model=model.safetensors --features query.npz gallery.npz --protocol=sysu_mm01_random

Writes calibration.json into the workdir, or beside the model (--out), where scripts/verify.py finds it, and prints a
table; docs/search.md says what is in both. --features are embeddings of --model (scripts/extract.py), with pids, camids
and modality; --protocol says which of them are of one place, by default those of one camera.
"""

import dataclasses
from pathlib import Path

from absl import flags

from mpanet_jax.datasets import PROTOCOLS, make_protocol
from mpanet_jax.embeddings import load_embeddings
from mpanet_jax.errors import UserError, run_script

WORKDIR = flags.DEFINE_string("workdir", None, "A training run: embeds the test set of its data set.")
DATA_DIR = flags.DEFINE_string("data_dir", None, "The run's prepared data, if not where config.dataset.data_dir was.")
FEATURES = flags.DEFINE_string("features", None, "Or an .npz of embeddings of --model; more of them may follow.")
MODEL = flags.DEFINE_string("model", None, "Of --features: a file of weights, a folder or a workdir.")
PROTOCOL = flags.DEFINE_enum(  # only what places are is asked of it, so those will do that need no file
    "protocol", None, [name for name, cls in PROTOCOLS.items() if not dataclasses.fields(cls)], "What --features are."
)
PRIOR = flags.DEFINE_float("prior", 0.5, "The share of pairs of the same person that is assumed.")
SEED = flags.DEFINE_integer("seed", 0, "Of the split of the identities.", lower_bound=0)
OUT = flags.DEFINE_string("out", None, "Where to write; default: calibration.json in the model's folder, or beside it.")


def main(files: list[str]) -> None:
    if bool(WORKDIR.value) == bool(FEATURES.value):
        raise UserError("expected one of --workdir and --features")
    if FEATURES.value and (not MODEL.value or DATA_DIR.value):
        raise UserError("--features: expected --model too, the model that made them, and no --data_dir")
    if WORKDIR.value and (files or MODEL.value or PROTOCOL.value):
        raise UserError("--model, --protocol and file names go with --features; a run says its own")
    if OUT.value and Path(OUT.value).suffix != ".json":
        raise UserError(f"--out={OUT.value}: expected the name of a file that ends in .json")
    if (MODEL.value or "").startswith("hf:") and not OUT.value:
        raise UserError(f"--model={MODEL.value}: expected --out too; the model's folder is Hugging Face's cache")
    from mpanet_jax.evaluation.calibration import calibrate, check_prior, format_calibration
    from mpanet_jax.evaluation.pair_score import calibration_path
    from mpanet_jax.evaluation.verification import join_embeddings
    from mpanet_jax.evaluation.workdir import embed_test_set
    from mpanet_jax.model import load

    check_prior(PRIOR.value)
    source = WORKDIR.value or MODEL.value
    model = load(source)
    if WORKDIR.value:
        embeddings, protocol, data = embed_test_set(model.settings, model.variables, source, data_dir=DATA_DIR.value)
    else:
        names = [FEATURES.value, *files]
        embeddings, data = join_embeddings([load_embeddings(name) for name in names]), ", ".join(names)
        protocol = make_protocol(PROTOCOL.value) if PROTOCOL.value else None
        if (size := embeddings.features.shape[1]) != model.size:
            raise UserError(f"--features: {data} hold vectors of {size} numbers, {source} makes such of {model.size}")
    calibration = calibrate(
        embeddings,
        model=model.source,
        fingerprint=model.fingerprint,
        data=data,
        protocol=protocol,
        prior=PRIOR.value,
        seed=SEED.value,
    )
    out = Path(OUT.value) if OUT.value else calibration_path(source)
    calibration.write(out)
    print(format_calibration(calibration))
    print(f"written to {out}")


if __name__ == "__main__":
    flags.FLAGS.set_gnu_getopt(True)  # flags may follow the files
    run_script(main)
