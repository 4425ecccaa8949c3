"""Turns reports of scripts/benchmark.py into tables in Markdown, each under a line on what it was measured with.

python -m benchmarks.tables runs/benchmark/*.json > benchmarks.md
"""

import json
import sys
from pathlib import Path
from typing import Any

from benchmarks.measure import format_value, rows_table
from mpanet_jax.errors import UserError
from mpanet_jax.methods import METHODS, settings_of
from mpanet_jax.settings_base import differences

TITLE = "# Measured\n\nWritten by `python -m benchmarks.tables` from the reports of `scripts/benchmark.py`.\n"
# Fields that are not listed: the method is in the heading, and the others do not change what is measured.
LEFT_OUT = ("dataset.source", "dataset.data_dir", "init_from", "preset", "method")


def table(report: dict[str, Any]) -> str:
    """One report as a table: its name, settings that differ from the method's defaults, machine, and results."""
    settings = settings_of(report["config"])
    results = report["results"]
    lines = ["| | |", "|---|---|", *(f"| {name} | {format_value(value)} |" for name, value in results.items())]
    return "\n".join(
        [
            "## " + ", ".join([f"{report['name']}: {settings.method}", *changed_fields(report)]),
            "",
            f"{made_of(report)}.",
            "",
            *(rows_table(results) if "rows" in results else lines),
            "",
        ]
    )


def changed_fields(report: dict[str, Any]) -> list[str]:
    """The settings that differ from the method's defaults, like '`dtype=float32`'."""
    settings = settings_of(report["config"])
    changed = differences(settings, METHODS[settings.method].settings())
    return [f"`{path}={here}`" for path, (here, _) in sorted(changed.items()) if path not in LEFT_OUT]


def made_of(report: dict[str, Any]) -> str:
    """Date, commit, device, processor and versions of a report."""
    device, versions = report["device"], report["versions"]
    made = [
        f"{report.get('date', 'no date')}, commit {report.get('commit', 'unknown')}",
        f"{device['count']} × {device['kind']}",
        f"{device['cpus']} CPU cores ({device.get('processor', 'unknown')})",
        ", ".join(f"{name} {version}" for name, version in versions.items()),
    ]
    return "; ".join(made)


def page(files: list[Path]) -> str:
    """A page with the tables of all reports in `files`.

    Raises:
      UserError: a file is not a report of scripts/benchmark.py.
    """
    tables = []
    for file in files:
        try:
            tables.append(table(json.loads(file.read_text())))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{file}: not a report of scripts/benchmark.py ({type(error).__name__}: {error})") from None
    return "\n".join([TITLE, *tables])


if __name__ == "__main__":
    try:
        print(page([Path(name) for name in sys.argv[1:]]), end="")
    except UserError as error:
        sys.exit(f"error: {error}")
