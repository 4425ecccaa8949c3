"""Draws how far images of one person are from each other and from images of other people: two distributions."""

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Int

from mpanet_jax.errors import UserError
from mpanet_jax.progress import Bar
from mpanet_jax.report.figures import BLUE, VERMILION, new_figure, save_figure
from mpanet_jax.report.sources import Source
from mpanet_jax.row_norms import l2_normalize

NUM_BINS = 80
EDGES = np.linspace(0.0, 2.0, NUM_BINS + 1)  # 1 − cosine
KINDS = ("cross-modality", "within one modality")
_ROWS = 1024


@dataclass(frozen=True)
class Distribution:
    """Numbers of pairs of images by their distance, 1 − cosine, in the `NUM_BINS` bins between `EDGES`.

    Attributes:
      intra: pairs of one identity in each bin.
      inter: pairs of two identities in each bin.
    """

    intra: Int[np.ndarray, " bins"]
    inter: Int[np.ndarray, " bins"]

    @property
    def overlap(self) -> float:
        """The area that the two densities share: Σ min(p, q) over the bins, from 0 (separate) to 1 (the same)."""
        return float(np.minimum(self.intra / self.intra.sum(), self.inter / self.inter.sum()).sum())


def distance_distributions(features: np.ndarray, pids: np.ndarray, modality: np.ndarray) -> dict[str, Distribution]:
    """Count the pairs of different images by distance, each pair once.

    Args:
      features: float[n, D], rows of any length.
      pids, modality: int[n]; an image is left out if one of its two is unknown (-1).

    Returns:
      {'cross-modality': distribution, 'within one modality': distribution}.

    Raises:
      UserError: some kind has no pairs of one identity, or none of two.
    """
    known = (pids >= 0) & (modality >= 0)
    unit, pids, modality = l2_normalize(features[known]), pids[known], modality[known]
    counts = {kind: np.zeros((2, NUM_BINS), np.int64) for kind in KINDS}
    columns = np.arange(len(unit))
    with Bar("distances", len(unit)) as bar:
        for start in range(0, len(unit), _ROWS):
            rows = columns[start : start + _ROWS]
            cosine = unit[rows] @ unit.T
            place = np.clip(((1 - cosine) / 2 * NUM_BINS).astype(np.int64), 0, NUM_BINS - 1)
            once = rows[:, None] < columns
            same_pid = pids[rows][:, None] == pids
            across = modality[rows][:, None] != modality
            for kind, chosen in zip(KINDS, (once & across, once & ~across), strict=True):
                for line, pairs in enumerate((chosen & same_pid, chosen & ~same_pid)):
                    counts[kind][line] += np.bincount(place[pairs], minlength=NUM_BINS)
            bar.advance(len(rows))
    for kind, (intra, inter) in counts.items():
        for what, number in (("one identity", intra.sum()), ("two identities", inter.sum())):
            if not number:
                raise UserError(
                    f"the images have no pairs of {what} ({kind}); expected two modalities and two identities"
                )
    return {kind: Distribution(*lines) for kind, lines in counts.items()}


def draw_distances(source: Source, folder: str | os.PathLike) -> list[Path]:
    """Draw distances.png and .svg: intra- and inter-identity distances and their overlap, for each of `KINDS`.

    Args:
      source: images of known identity and modality.
      folder: the folder to write to.

    Returns:
      The paths of the two files.

    Raises:
      UserError: some kind of pair does not occur, or matplotlib is not installed.
    """
    found = distance_distributions(source.images.features, source.images.pids, source.modality)
    shown = [d for distribution in found.values() for d in (distribution.intra, distribution.inter)]
    used = np.flatnonzero(np.sum(shown, axis=0))
    low, high = EDGES[used[0]], EDGES[used[-1] + 1]
    with new_figure(72) as figure:
        axes = figure.subplots(len(found), 1, sharex=True)
        for panel, (kind, distribution) in zip(axes, found.items(), strict=True):
            for counts, colour, hatch, label in (
                (distribution.intra, BLUE, None, "one identity"),
                (distribution.inter, VERMILION, "////", "two identities"),
            ):
                density = counts / counts.sum() / (EDGES[1] - EDGES[0])
                style = {"facecolor": colour, "alpha": 0.35} if hatch is None else {"facecolor": "none", "hatch": hatch}
                panel.stairs(density, EDGES, fill=True, edgecolor=colour, linewidth=0.5, label=label, **style)
                panel.stairs(density, EDGES, color=colour, linestyle="-" if hatch is None else "--")
            panel.set(xlim=(low, high), ylabel="density")
            pairs = f"{distribution.intra.sum():,} and {distribution.inter.sum():,} pairs"
            panel.set_title(f"{kind}: {100 * distribution.overlap:.1f} % overlap ({pairs})", loc="left")
        axes[-1].set_xlabel("distance, 1 − cosine")
        handles, labels = axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=2, handlelength=1.4)
        return save_figure(figure, folder, "distances")
