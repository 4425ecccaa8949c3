"""Calibrates a model's similarities on pairs of one half of the test identities, and tests that on the other half.

python scripts/calibrate.py --workdir=runs/sysu
python scripts/calibrate.py --workdir=runs/sysu --prior=0.01 --seed=1 --data_dir=data
python scripts/calibrate.py --model=model.safetensors --features query.npz gallery.npz --protocol=sysu_mm01_random

Writes calibration.json into the workdir or beside the model (or to --out), where scripts/verify.py finds it, and prints
a table; docs/search.md explains both. --features are embeddings that scripts/extract.py has made with --model, with
pids, camids and modality. Pairs taken in one place are left out: by default in one camera; --protocol may say more.
"""

import dataclasses
from pathlib import Path

from absl import flags

from mpanet_jax.datasets import PROTOCOLS, make_protocol
from mpanet_jax.embeddings import load_embeddings
from mpanet_jax.errors import UserError, run_script

WORKDIR = flags.DEFINE_string("workdir", None, "A training run: embeds the test set of its data set.")
DATA_DIR = flags.DEFINE_string("data_dir", None, "The folder of prepared data, if it is not config.dataset.data_dir.")
FEATURES = flags.DEFINE_string("features", None, "Or an .npz file of embeddings by --model; more files may follow.")
MODEL = flags.DEFINE_string("model", None, "The model that made --features: a file of weights, a folder or a workdir.")
PROTOCOL = flags.DEFINE_enum(  # it only says what a place is, so the protocols that need no file are enough
    "protocol",
    None,
    [name for name, cls in PROTOCOLS.items() if not dataclasses.fields(cls)],
    "The protocol of --features, which says what one place is.",
)
PRIOR = flags.DEFINE_float("prior", 0.5, "The assumed share of pairs of the same person.")
SEED = flags.DEFINE_integer("seed", 0, "The seed that splits the identities into halves.", lower_bound=0)
OUT = flags.DEFINE_string(
    "out", None, "The file to write; default: calibration.json in the model's folder, or beside its file."
)


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
            raise UserError(
                f"--features: {data} hold vectors of {size} numbers, and {source} makes vectors of {model.size}; "
                "name the model that made them"
            )
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
