"""The common style of all figures, and how they are saved: PNG and SVG, 85 mm wide, no text below 6 points."""

import contextlib
import io
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from PIL import Image

from mpanet_jax.files import write_whole
from mpanet_jax.report.requirements import require_report

WIDTH_MM = 85  # the width of a paper's column
DOTS_PER_INCH = 300

# Paul Tol's 'muted' scheme and black: ten colours that people with any kind of colour vision can tell apart.
COLOURS = (
    *("#CC6677", "#332288", "#DDCC77", "#117733", "#88CCEE"),
    *("#882255", "#44AA99", "#999933", "#AA4499", "#000000"),
)
# Okabe and Ito's blue and vermilion, for comparing two things.
BLUE, VERMILION = "#0072B2", "#D55E00"
DASHES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (1, 3)))  # so that lines differ by more than colour
HEAT = "cividis"  # from blue to yellow, also for colour-blind eyes
PHOTO_ASPECT = 2.2  # height over width of every photo: all are drawn in the same proportions

_STYLE: dict[Any, Any] = {
    "font.size": 7.0,
    "axes.titlesize": 7.0,
    "axes.labelsize": 7.0,
    "xtick.labelsize": 6.0,
    "ytick.labelsize": 6.0,
    "legend.fontsize": 6.0,
    "figure.titlesize": 7.0,
    "font.family": "DejaVu Sans",  # part of matplotlib, so pictures are the same everywhere
    "axes.linewidth": 0.6,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "lines.linewidth": 1.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
    "svg.fonttype": "none",  # keep text as text
    "svg.hashsalt": "mpanet_jax",  # equal pictures give equal files
}


@contextlib.contextmanager
def new_figure(height_mm: float, *, width_mm: float = WIDTH_MM) -> Iterator[Any]:
    """A matplotlib Figure of this size in the common style, without a window.

    Draw and `save_figure` it inside the `with` block.

    Raises:
      UserError: matplotlib is not installed.
    """
    require_report("matplotlib")
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_STYLE):
        yield Figure(figsize=(width_mm / 25.4, height_mm / 25.4), layout="constrained", dpi=DOTS_PER_INCH)


def show_photo(cell: Any, photo: Image.Image, heat: Float[np.ndarray, "h w"] | None = None) -> None:
    """Show a photo in an Axes without ticks and frame, or its grey values under a map of heat, scaled to 0 to 1."""
    pixels = np.asarray(photo)
    options = {"extent": (0, 1, PHOTO_ASPECT, 0), "aspect": "equal"}
    cell.set(xticks=[], yticks=[])
    cell.spines[:].set_visible(False)
    cell.imshow(pixels if heat is None else pixels.mean(-1), cmap="gray", vmin=0, vmax=255, **options)
    if heat is not None:
        low, high = heat.min(), heat.max()
        heat = (heat - low) / (high - low if high > low else 1)
        cell.imshow(heat, cmap=HEAT, alpha=0.6, interpolation="bilinear", vmin=0, vmax=1, **options)


def plain_numbers(axis: Any) -> None:
    """Write the ticks of a logarithmic axis as 0.01, not as powers of ten, whose exponents are too small to read."""
    from matplotlib.ticker import FuncFormatter, NullFormatter

    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def save_figure(figure: Any, folder: str | os.PathLike, name: str) -> list[Path]:
    """Write `name`.png and `name`.svg into the folder, each whole or not at all, and return their paths."""
    written = []
    for kind, metadata in (("png", {"Software": None}), ("svg", {"Date": None, "Creator": None})):
        buffer = io.BytesIO()
        figure.savefig(buffer, format=kind, dpi=DOTS_PER_INCH, metadata=metadata)
        path = Path(folder) / f"{name}.{kind}"
        with write_whole(path, "wb") as file:
            file.write(buffer.getvalue())
        written.append(path)
    return written
