"""Reports the runs in `lab.Results` as a table in Markdown and as a picture."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ablations.lab import Results
from ablations.tables import Row, Table
from mpanet_jax.errors import UserError
from mpanet_jax.evaluation.trials import average_seeds
from mpanet_jax.settings import Settings

FIGURES = {"rank1": "Rank-1", "mAP": "mAP", "mINP": "mINP"}
PUBLISHED_ON = "SYSU-MM01, all-search, single-shot"


@dataclass(frozen=True)
class Line:
    """A row of the table, with the results of its runs.

    Attributes:
      row: the row.
      seeds: the seeds of its finished runs.
      errors: {seed: error} of the runs that failed.
      mean, std: {"rank1": …}, mean and standard deviation over the seeds, in percent; empty if no run is finished.
      interval: {"rank1": (low, high)}, the ends of the runs' bootstrap intervals, averaged over the seeds.
      gains: for each seed that both rows have, this row's mAP minus the first row's, in percentage points.
      images: how many images a run saw in training, counting repetitions.
      data: what the figures were measured on: the protocol's first setting, and the images' size.
    """

    row: Row
    seeds: list[int]
    errors: dict[int, str]
    mean: dict[str, float]
    std: dict[str, float]
    interval: dict[str, tuple[float, float]]
    gains: list[float]
    images: int
    data: str


def lines_of(table: Table, recipes: Mapping[str, Settings], results: Results) -> list[Line]:
    """The lines of a table; `recipes` is {row's name: settings}."""
    first = results.finished(recipes[table.rows[0].name])
    return [_line(row, recipes[row.name], results, first) for row in table.rows]


def _line(row: Row, settings: Settings, results: Results, first: dict[int, Any]) -> Line:
    runs, errors = results.finished(settings), results.errors(settings)
    if not runs:
        return Line(row, [], errors, {}, {}, {}, [], 0, "")
    seeds = sorted(runs)
    metrics = [runs[seed]["metrics"] for seed in seeds]
    setting, averaged = next(iter(average_seeds(metrics, seeds, [f"{row.name}, seed {s}" for s in seeds]).items()))
    intervals = [values[setting].get("interval") for values in metrics]
    ends = {n: np.mean([i[n] for i in intervals], axis=0) for n in FIGURES} if all(intervals) else {}
    own, others = ({s: r["metrics"][setting]["mAP"] for s, r in of.items()} for of in (runs, first))
    gains = [own[seed] - others[seed] for seed in seeds if seed in others]
    data = settings.data
    return Line(
        row,
        seeds,
        errors,
        {name: averaged[name] for name in FIGURES},
        {name: averaged["std"][name] for name in FIGURES},
        {name: (float(low), float(high)) for name, (low, high) in ends.items()},
        gains,
        runs[seeds[0]]["images"],
        f"{setting}, {data.height}×{data.width}",
    )


def markdown(table: Table, recipes: Mapping[str, Settings], results: Results) -> str:
    """The table in Markdown, with an explanation of its columns; `recipes` is {row's name: settings}."""
    lines = lines_of(table, recipes, results)
    header = ["row", "published Rank-1 / mAP", *FIGURES.values(), "mAP − first row's"]
    header += ["Rank-1 interval", "mAP interval", "images", "seeds"]
    text = [f"# {table.title}", "", f"| {' | '.join(header)} |", "|---" * len(header) + "|"]
    text += [f"| {' | '.join(_cells(line, line is lines[0]))} |" for line in lines]
    failed = [f"- {line.row.title}, seed {seed}: {error}" for line in lines for seed, error in line.errors.items()]
    text += ["", "Failed:", "", *failed] if failed else []
    data = sorted({line.data for line in lines if line.seeds})
    text += [
        "",
        f"Published: {PUBLISHED_ON}. The other columns are from the runs here ({'; '.join(data) or 'none yet'}): mean "
        "± standard deviation over the seeds, in percent. The difference is between runs of the same seed. Intervals "
        "are 95 % bootstrap intervals over query identities, their ends averaged over the seeds. Images: how many a "
        "run saw in training, counting repetitions." + (f" {table.note}" if table.note else ""),
    ]
    return "\n".join(text) + "\n"


def _cells(line: Line, is_first: bool) -> list[str]:
    published = "" if line.row.published is None else "{:.2f} / {:.2f}".format(*line.row.published)
    if not line.seeds:
        return [line.row.title, published, *[""] * 7, "failed" if line.errors else "not run"]
    figures = [_plus_minus(line.mean[name], line.std[name], len(line.seeds)) for name in FIGURES]
    gains = [] if is_first else line.gains
    gain = _plus_minus(float(np.mean(gains)), float(np.std(gains)), len(gains), "+.1f") if gains else ""
    intervals = ["{:.1f}–{:.1f}".format(*line.interval[name]) if line.interval else "" for name in ("rank1", "mAP")]
    seeds = ", ".join(map(str, line.seeds)) + (f" ({len(line.errors)} failed)" if line.errors else "")
    return [line.row.title, published, *figures, gain, *intervals, f"{line.images:,}", seeds]


def _plus_minus(mean: float, std: float, count: int, form: str = ".1f") -> str:
    return f"{mean:{form}} ± {std:.1f}" if count > 1 else f"{mean:{form}}"


def load_pyplot() -> Any:
    """Import matplotlib's pyplot, set up to write files.

    Raises:
      UserError: matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError:
        raise UserError(
            "--png: needs matplotlib, which is not installed; pip install matplotlib, or give --nopng"
        ) from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def draw(table: Table, recipes: Mapping[str, Settings], results: Results, path: Path) -> None:
    """Draw Rank-1 and mAP of every row as a bar, with the standard deviation over the seeds and the published figure.

    Args:
      table: the table.
      recipes: {row's name: settings}.
      results: the runs.
      path: the picture to write.

    Raises:
      UserError: matplotlib is not installed.
    """
    pyplot = load_pyplot()
    lines = [line for line in lines_of(table, recipes, results) if line.seeds]
    figure, axes = pyplot.subplots(1, 2, figsize=(11, 1.4 + 0.45 * max(len(lines), 1)), sharey=True)
    for axis, name, place in zip(axes, ("rank1", "mAP"), (0, 1), strict=True):
        _draw_bars(axis, lines, name, place)
    axes[0].invert_yaxis()
    axes[0].legend(loc="upper center", bbox_to_anchor=(1.05, -0.18), ncols=2, frameon=False)
    figure.suptitle(table.title)
    figure.savefig(path, dpi=150, bbox_inches="tight")
    pyplot.close(figure)


def _draw_bars(axis: Any, lines: Sequence[Line], name: str, published: int) -> None:
    places = range(len(lines))
    axis.barh(
        places,
        [line.mean[name] for line in lines],
        xerr=[line.std[name] for line in lines],
        height=0.6,
        color="#8fb3d9",
        capsize=3,
        label="here: mean ± standard deviation over the seeds",
    )
    known = [
        (line.row.published[published], place) for place, line in zip(places, lines, strict=True) if line.row.published
    ]
    if known:
        axis.plot(*zip(*known, strict=True), "D", color="#b3402a", label=f"published: {PUBLISHED_ON}")
    axis.set_yticks(places, [line.row.title for line in lines])
    axis.set_xlabel(f"{FIGURES[name]} (%)")
    axis.grid(axis="x", alpha=0.3)
