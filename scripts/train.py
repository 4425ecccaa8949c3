"""Trains MPANet: python scripts/train.py --config=configs/sysu.py --workdir=runs/sysu

Prepares the data set if need be, goes on from the newest checkpoint in --workdir if there is one, evaluates by the data
set's protocol and writes WORKDIR/metrics.json. It uses all accelerators of this machine. To use those of several
machines, start one process on each, with --distributed.
"""

import sys
from pathlib import Path

from absl import flags
from ml_collections import config_flags

from mpanet_jax.compilation import DEFAULT_CACHE, set_compilation_cache, start_fast
from mpanet_jax.errors import UserError, run_script

config_flag = config_flags.DEFINE_config_file(
    "config", None, "configs/NAME.py, or configs/NAME.py:preset", lock_config=True
)
workdir_flag = flags.DEFINE_string(
    "workdir", None, "the run's folder; default: runs/NAME, or runs/NAME_preset for --config=configs/NAME.py:preset"
)
cache_flag = flags.DEFINE_string(
    "compilation_cache", DEFAULT_CACHE, "folder of compiled programs, for faster starts; '': none"
)
distributed_flag = flags.DEFINE_bool(
    "distributed",
    False,
    "join other processes, which a scheduler (Slurm, Open MPI, …) or the three flags below name",
)
coordinator_flag = flags.DEFINE_string("coordinator_address", None, "HOST:PORT of process 0")
num_processes_flag = flags.DEFINE_integer("num_processes", None, "how many processes there are", lower_bound=1)
process_flag = flags.DEFINE_integer("process_id", None, "which process this is, from 0", lower_bound=0)
timeout_flag = flags.DEFINE_integer(
    "process_timeout", 1800, "how many seconds processes wait for a slower one", lower_bound=1
)
flags.mark_flag_as_required("config")


def main(arguments: list[str]) -> None:
    if arguments:
        raise UserError(f"{arguments[0]}: not a flag; see --help")
    if workdir_flag.value == "":
        raise UserError("--workdir: is empty; name a folder, or leave the flag out for runs/NAME")
    of_several = [f for f in (coordinator_flag, num_processes_flag, process_flag, timeout_flag) if f.present]
    if of_several and not distributed_flag.value:
        raise UserError(f"--{of_several[0].name} goes with --distributed; without it this process trains alone")
    from mpanet_jax.evaluation.metrics_output import format_table
    from mpanet_jax.loop import train
    from mpanet_jax.methods import settings_of
    from mpanet_jax.processes import is_first_process, start_processes

    set_compilation_cache(cache_flag.value)
    if distributed_flag.value:
        start_processes(coordinator_flag.value, num_processes_flag.value, process_flag.value, timeout_flag.value)
    config_file, _, options = config_flags.get_config_filename(flags.FLAGS["config"]).partition(":")
    name = "_".join([Path(config_file).stem, *filter(None, options.replace("=", "").split(","))])
    workdir = Path(workdir_flag.value or f"runs/{name}")
    results = train(settings_of(config_flag.value.to_dict()), workdir)
    if is_first_process():
        print(format_table(results))


if __name__ == "__main__":
    # Reading the config imports most modules. Whether this process joins others is not known before, so a word decides.
    words = " ".join(sys.argv)
    start_fast(devices="--config" in words and not ("distributed" in words or "flagfile" in words))
    run_script(main)
