"""Writes the tables of docs/performance.md from the reports in docs/results/: python -m benchmarks.page

A table stands between two comments, the first of which names its reports and its columns:

    <!-- measured: growth_ids | ids: identities; plan_cpu_seconds: plan an epoch, CPU s -->
    <!-- end -->

A report is a file that `scripts/benchmark.py NAME --out=…` wrote there. One of `growth` is a table; several
others, as in `step, step_float32 | images_per_second: images/s`, are one with a row each. Command, date, commit, device
and versions stand below. Where a report is not there yet, what stands between the comments stays.
"""

import json
import re
import shlex
import sys
from pathlib import Path
from typing import Any

from benchmarks.measure import format_value, rows_table
from benchmarks.provenance import ROOT
from benchmarks.tables import changed_fields, made_of
from mpanet_jax.errors import UserError
from mpanet_jax.files import write_whole

PAGE = ROOT / "docs/performance.md"
RESULTS = ROOT / "docs/results"
_PART = re.compile(r"(<!-- measured: (.+?) \| (.+?) -->\n)(?:.*?)(<!-- end -->)", re.S)


def filled(text: str, folder: Path = RESULTS) -> tuple[str, list[str]]:
    """A page with its tables written anew, and the names of the reports that are not there.

    Raises:
      UserError: a report that is none, or that lacks a column.
    """
    missing: list[str] = []

    def written(part: re.Match[str]) -> str:
        head, names, columns, end = part.groups()
        paths = [folder / f"{name.strip()}.json" for name in names.split(",")]
        absent = [path.stem for path in paths if not path.is_file()]
        missing.extend(absent)
        if absent:
            return part[0]
        titles = dict(column.strip().split(": ", 1) for column in columns.split(";"))
        reports = {path: _read(path) for path in paths}
        try:
            return f"{head}{_table(list(reports.values()), titles)}\n{end}"
        except KeyError as error:
            raise UserError(f"{' or '.join(map(str, paths))}: its results have no {error}; measure it anew") from None

    return _PART.sub(written, text), missing


def _read(path: Path) -> dict[str, Any]:
    try:
        report = json.loads(path.read_text())
        made_of(report), report["results"], report["command"], report["config"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: no report of scripts/benchmark.py ({type(error).__name__}: {error})") from None
    return report


def _table(reports: list[dict[str, Any]], titles: dict[str, str]) -> str:
    if "rows" in reports[0]["results"]:
        lines = rows_table(reports[0]["results"], titles)
    else:
        lines = [f"| | {' | '.join(titles.values())} |", f"|{'---|' * (len(titles) + 1)}"]
        for report in reports:
            figures = [format_value(report["results"][name]) for name in titles]
            lines.append(f"| {' | '.join([_title(report), *figures])} |")
    made = dict.fromkeys(made_of(report) for report in reports)
    commands = dict.fromkeys(f"`{_command(report)}`" for report in reports)
    return "\n".join([*lines, "", f"Measured by {', '.join(commands)}: {'; and on '.join(made)}."])


def _title(report: dict[str, Any]) -> str:
    given = [f"`{name}`" for name in report["results"].get("compiler_options", ())]
    return ", ".join([f"`{report['name']}`", *changed_fields(report), *given])


def _command(report: dict[str, Any]) -> str:
    """How the report was made, without where it was put."""
    words = shlex.split(report["command"])
    return shlex.join(word for word in words if not word.startswith("--out="))


def main() -> None:
    """Writes the page."""
    text, missing = filled(PAGE.read_text())
    with write_whole(PAGE) as file:
        file.write(text)
    if missing:
        print(f"not measured yet, left as it stands: {', '.join(missing)}", file=sys.stderr)


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
