"""Evaluates a trained model, or embeddings of any framework, by a named protocol.

python scripts/evaluate.py --workdir=runs/sysu
python scripts/evaluate.py --workdirs='runs/regdb_*'       (one run for each trial, averaged)
python scripts/evaluate.py --workdirs='runs/sysu_seed*'    (one run for each seed, averaged)
python scripts/evaluate.py --workdir=runs/sysu --dataset=regdb --data_dir=data    (a model on another data set)
python scripts/evaluate.py --features query.npz gallery.npz --protocol sysu_mm01 \
    --permutation rand_perm_cam.mat --out metrics.json
"""

from pathlib import Path

from absl import flags

from mpanet_jax import datasets
from mpanet_jax.datasets import DATASETS, PROTOCOLS
from mpanet_jax.errors import ArgumentError, UserError, run_script
from mpanet_jax.evaluation.evaluate import evaluate
from mpanet_jax.evaluation.metrics import CMC_DEFINITIONS, METRICS
from mpanet_jax.evaluation.metrics_output import format_table, write_metrics

FEATURES = flags.DEFINE_string(
    "features", None, "QUERY.npz, followed by GALLERY.npz (regdb, llcm, own: the visible and the infrared images)."
)
PROTOCOL = flags.DEFINE_enum("protocol", None, list(PROTOCOLS), "How --features are compared.")
PERMUTATION = flags.DEFINE_string("permutation", None, "SYSU-MM01's rand_perm_cam.mat, for --protocol sysu_mm01.")
WORKDIR = flags.DEFINE_string("workdir", None, "A training run, whose checkpoint is evaluated.")
WORKDIRS = flags.DEFINE_string(
    "workdirs", None, "A pattern of runs to average: one for each trial of RegDB, or one for each seed."
)
CHECKPOINT = flags.DEFINE_enum(
    "checkpoint",
    "last",
    ["last", "best", "untrained"],
    "Which checkpoint of --workdir(s); untrained: the network before its first step.",
)
DATASET = flags.DEFINE_enum(
    "dataset", None, list(DATASETS), "Test the model of --workdir on this data set, by its protocol."
)
TRIAL = flags.DEFINE_integer("trial", None, "Which split of --dataset (regdb: 1 to 10); default: 1.")
DATA_DIR = flags.DEFINE_string("data_dir", None, "The folder of prepared data, if it is not config.dataset.data_dir.")
RERANK = flags.DEFINE_bool("rerank", None, "k-reciprocal re-ranking; off by default, as in the papers' tables.")
METRIC = flags.DEFINE_enum("metric", None, METRICS, "The distance; default: the protocol's.")
CMC = flags.DEFINE_enum(
    "cmc",
    None,
    CMC_DEFINITIONS,
    "Whether Rank-k counts identities, at their first appearance, or images; default: the protocol's.",
)
OUT = flags.DEFINE_string(
    "out",
    None,
    "The file of metrics to write; default: WORKDIR/metrics.json, but none with --rerank, --metric or --cmc.",
)


def main(files: list[str]) -> None:
    given = [flag.name for flag in (FEATURES, WORKDIR, WORKDIRS) if flag.value]
    if len(given) != 1:
        raise UserError(f"expected one of --features, --workdir and --workdirs, got {', '.join(given) or 'none'}")
    options = {"rerank": RERANK.value, "metric": METRIC.value, "cmc": CMC.value}
    as_the_run_says = all(value is None for value in options.values())
    if FEATURES.value and CHECKPOINT.value != "last":
        raise UserError(f"--checkpoint={CHECKPOINT.value} goes with --workdir or --workdirs, not with --features")
    if FEATURES.value and (len(files) != 1 or PROTOCOL.value is None):
        raise UserError("--features: expected --features QUERY.npz GALLERY.npz --protocol " + "|".join(PROTOCOLS))
    if WORKDIRS.value and files:
        raise UserError(f"--workdirs: {files[0]} follows it; quote the pattern: --workdirs='runs/regdb_*'")
    if FEATURES.value and DATA_DIR.value:
        raise UserError("--data_dir goes with --workdir or --workdirs, not with --features")
    if not FEATURES.value and (files or PROTOCOL.value or PERMUTATION.value):
        raise UserError("--protocol, --permutation and file names go with --features; a run's config says its own")
    if DATASET.value and not WORKDIR.value:
        raise UserError("--dataset goes with --workdir: it tests that run's model on another data set")
    if TRIAL.value is not None and not DATASET.value:
        raise UserError("--trial goes with --dataset; a run is tested on the split that it was trained on")
    out = OUT.value
    if FEATURES.value:
        options.update(protocol=PROTOCOL.value, permutation=PERMUTATION.value, rerank=bool(RERANK.value))
        metrics = evaluate(FEATURES.value, files[0], **options)
    else:
        # These import JAX, which embeddings do not need.
        from mpanet_jax.evaluation.trials import evaluate_workdirs
        from mpanet_jax.evaluation.workdir import evaluate_workdir
        from mpanet_jax.run_files import METRICS_FILES

        options.update(checkpoint=CHECKPOINT.value, data_dir=DATA_DIR.value)
        if WORKDIR.value:
            metrics = evaluate_workdir(Path(WORKDIR.value), dataset=_other_dataset(), **options)
            # The run's own files hold figures by its own options only; training reads that of the best checkpoint.
            if as_the_run_says:
                file = METRICS_FILES[CHECKPOINT.value]
                if DATASET.value:
                    file = file.replace(".json", f"_on_{DATASET.value}{TRIAL.value or ''}.json")
                out = out or Path(WORKDIR.value) / file
        else:
            metrics = evaluate_workdirs(WORKDIRS.value, lambda workdir: evaluate_workdir(workdir, **options))
    print(format_table(metrics))
    if out:
        write_metrics(out, metrics)


def _other_dataset():
    """The settings of --dataset; None without that flag."""
    if not DATASET.value:
        return None
    from mpanet_jax.run_files import load_settings

    tree = {"name": DATASET.value, "data_dir": DATA_DIR.value or load_settings(WORKDIR.value).dataset.data_dir}
    if TRIAL.value is not None:
        if (owner := datasets.own_fields()["trial"].name) != DATASET.value:
            raise ArgumentError("trial", f"= {TRIAL.value}: goes with --dataset {owner}")
        tree["trial"] = TRIAL.value
    return datasets.settings_of(tree)


if __name__ == "__main__":
    flags.FLAGS.set_gnu_getopt(True)  # flags may follow GALLERY.npz
    run_script(main)
