"""Runs tables of ablations, each row with several seeds: python scripts/ablate.py --table=3 --table=4 --config=…

python scripts/make_synthetic.py --scale=bench --out=data/raw/bench
python scripts/ablate.py --config=configs/synthetic_gpu.py:official --config.dataset.source=data/raw/bench --table=3

Writes OUT/ablations.json after every run, and OUT/table_NAME.md and OUT/table_NAME.png for each table at the end. A run
that is in the JSON is not repeated, whichever table asks for it. So if this script is killed, or is stopped by
--time_limit, the same command goes on; it needs only the JSON, on another machine too. --time_limit=0 runs nothing and
writes the tables again. The exit code is 1 if a run failed; the table names it, and the same command tries it again.
"""

import runpy
import sys
import time
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import config_flags

from mpanet_jax.compilation import DEFAULT_CACHE, autotune_fewer_tilings
from mpanet_jax.errors import UserError, run_script

CONFIG = config_flags.DEFINE_config_file(
    "config", None, "the recipe and the data that all rows start from; a row changes only its own fields"
)
TABLES = flags.DEFINE_multi_string(
    "table", None, "3, 4, methods or augmentations; may be given several times", required=True
)
ROWS = flags.DEFINE_list("rows", [], "only these rows, by the names of their folders: baseline,cc")
SEEDS = flags.DEFINE_integer("seeds", 3, "how many runs a row has, with the seeds 0, 1, …", lower_bound=1)
OUT = flags.DEFINE_string("out", "runs/ablations/results", "the folder of ablations.json and the tables")
WORKDIR = flags.DEFINE_string(
    "workdir", "runs/ablations", "the folder of the runs, ROW_SEED, and of their output, ROW.log"
)
TIME_LIMIT = flags.DEFINE_float("time_limit", None, "seconds after which no more runs start", lower_bound=0)
JOBS = flags.DEFINE_integer(
    "jobs",
    1,
    "how many rows run at a time and share the accelerator; they are compiled one after the other",
    lower_bound=1,
)
PNG = flags.DEFINE_bool("png", True, "also draw the tables; needs matplotlib")
CACHE = flags.DEFINE_string(
    "compilation_cache", DEFAULT_CACHE, "folder of compiled programs, for faster starts; '': none"
)
flags.mark_flag_as_required("config")


def main(arguments: list[str]) -> int:
    start = time.time()
    if arguments:
        raise UserError(f"{arguments[0]}: not a flag; see --help")
    from ablations import lab, report
    from ablations.tables import TABLES as KNOWN
    from mpanet_jax import datasets
    from mpanet_jax.settings_base import expected_one_of

    for name in TABLES.value:
        if name not in KNOWN:
            raise UserError(f"--table {expected_one_of(name, KNOWN)}")
    tables = {name: KNOWN[name] for name in TABLES.value}
    rows = {row.name: row for table in tables.values() for row in table.rows}
    for name in ROWS.value:
        if name not in rows:
            raise UserError(f"--rows {expected_one_of(name, rows)}")
    if PNG.value:
        report.load_pyplot()  # before the work, not after it

    out, deadline = Path(OUT.value), start + (TIME_LIMIT.value if TIME_LIMIT.value is not None else float("inf"))
    results = lab.Results.load(out / "ablations.json")
    recipes = {name: settings_of_row(row) for name, row in rows.items()}
    asked = {name: settings for name, settings in recipes.items() if not ROWS.value or name in ROWS.value}
    left = lab.work_left(asked, range(SEEDS.value), results)
    if left and time.time() <= deadline:
        datasets.open_split(left[0].runs[0].dataset, "train")  # prepares it once, before several rows start
        share = None if JOBS.value == 1 else 0.9 / JOBS.value
        options = lab.Options(Path(WORKDIR.value), deadline, CACHE.value, share)
        lab.run_work(left, results, options, jobs=JOBS.value, report=lambda line: print(line, flush=True))
    out.mkdir(parents=True, exist_ok=True)
    for name, table in tables.items():
        text = report.markdown(table, recipes, results)
        (out / f"table_{name}.md").write_text(text)
        print(f"\n{text}")
        if PNG.value:
            report.draw(table, recipes, results, out / f"table_{name}.png")
    still = sum(len(work.runs) for work in lab.work_left(asked, range(SEEDS.value), results))
    if still:
        print(f"{still} runs are left; the same command goes on with them", file=sys.stderr)
    return int(any(results.errors(settings) for settings in asked.values()))


def settings_of_row(row: Any) -> Any:
    """The settings of a row: the config file's for the row's preset, changed by the flags, then by the row."""
    from mpanet_jax.methods import settings_of
    from mpanet_jax.settings_base import replace

    config = CONFIG.value
    if row.preset is not None:
        path = config_flags.get_config_filename(flags.FLAGS["config"]).partition(":")[0]
        try:
            config = runpy.run_path(path)["get_config"](row.preset)
        except (TypeError, ValueError) as error:
            raise UserError(
                f"--config={path}: row {row.name!r} needs {path}:{row.preset}, which does not exist ({error}); "
                "use configs/synthetic_gpu.py, or choose other rows with --rows"
            ) from None
        try:
            config.update_from_flattened_dict(config_flags.get_override_values(flags.FLAGS["config"]))
        except (KeyError, AttributeError, TypeError) as error:
            raise UserError(f"--config: {path}:{row.preset}, of row {row.name!r}, has no such field: {error}") from None
    return replace(settings_of(config.to_dict()), row.changes)


if __name__ == "__main__":
    autotune_fewer_tilings()
    run_script(main)
