"""Trains MPANet: python scripts/train.py --config=configs/sysu.py --workdir=runs/sysu

Prepares the data set on the first run, resumes from the newest checkpoint under --workdir, evaluates by the data set's
protocol and writes WORKDIR/metrics.json.
"""

from pathlib import Path

from absl import flags
from ml_collections import config_flags

from mpanet_jax.errors import run_script

config_flag = config_flags.DEFINE_config_file(
    "config", None, "configs/NAME.py, or configs/NAME.py:preset", lock_config=True
)
workdir_flag = flags.DEFINE_string("workdir", None, "the run's folder; runs/<config's file name> by default")
cache_flag = flags.DEFINE_string(
    "compilation_cache", "~/.cache/mpanet_jax/xla", "folder for compiled programs, '' for none; makes later starts fast"
)
flags.mark_flag_as_required("config")


def main(_: list[str]) -> None:
    import jax

    from mpanet_jax.evaluation.evaluate import format_table
    from mpanet_jax.train import train

    if cache_flag.value:
        jax.config.update("jax_compilation_cache_dir", str(Path(cache_flag.value).expanduser()))
    config_file = config_flags.get_config_filename(flags.FLAGS["config"])
    name = Path(config_file.partition(":")[0]).stem
    workdir = Path(workdir_flag.value or f"runs/{name}")
    print(format_table(train(config_flag.value, workdir)))


if __name__ == "__main__":
    run_script(main)
