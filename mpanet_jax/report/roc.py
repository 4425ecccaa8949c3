"""Draws the receiver operating characteristic: how well similarity tells whether two images show the same person."""

import os
from pathlib import Path

import numpy as np

from mpanet_jax.embeddings import check_embeddings
from mpanet_jax.errors import UserError
from mpanet_jax.evaluation.verification import CROSS, SAME, area_under, equal_error_rate, make_curve, make_pairs
from mpanet_jax.report.figures import BLUE, VERMILION, new_figure, plain_numbers, save_figure
from mpanet_jax.report.sources import Source

LABELS = {CROSS: "cross-modality", SAME: "within one modality"}
_MOST_POINTS = 2000  # of a curve that are drawn, about


def draw_roc(source: Source, folder: str | os.PathLike, *, seed: int = 0) -> list[Path]:
    """Draw roc.png and .svg: a curve for pairs across modalities and one for pairs within one modality.

    The legend gives their equal error rates and areas. Two images from one place are not paired (`make_pairs`).

    Args:
      source: images of known identity and modality.
      folder: the folder to write to.
      seed: seeds the draw of pairs if there are very many.

    Returns:
      The paths of the two files.

    Raises:
      UserError: a kind has no pairs of one person or none of two people, or matplotlib is not installed.
    """
    images = check_embeddings(source.images)
    places = source.tests[0]().protocol.places(images) if source.tests else images.camids
    with new_figure(72) as figure:
        panel = figure.subplots()
        lowest = 1.0
        for kind, colour, dash in ((CROSS, BLUE, "-"), (SAME, VERMILION, "--")):
            pairs = make_pairs(images, places, kind, seed=seed)
            if not pairs.same.any() or pairs.same.all():
                lacking = "one person" if not pairs.same.any() else "two people"
                raise UserError(
                    f"{source.title}: no pairs of {lacking} ({LABELS[kind]}); expected some of one and of two"
                )
            curve = make_curve(pairs)
            # The first 500 points, which a logarithmic axis spreads out, and a regular sample of the others.
            false, true = curve.false_positive_rate, curve.true_positive_rate
            step = max(1, len(false) // _MOST_POINTS)
            kept = sorted({*range(0, len(false), step), *range(min(len(false), 500)), len(false) - 1})
            text = f"{LABELS[kind]}: EER {100 * equal_error_rate(curve):.1f} %, area {area_under(curve):.3f}"
            panel.step(false[kept], true[kept], where="post", color=colour, linestyle=dash, label=text, gid=kind)
            lowest = min(lowest, 1 / curve.false_positives[-1])
        chance = np.geomspace(lowest, 1, 100)  # curved on a logarithmic axis
        panel.plot(chance, chance, color="#777777", linewidth=0.6, linestyle=":", gid="chance")
        panel.set(xscale="log", xlim=(max(lowest, 1e-5), 1), ylim=(0, 1.01))
        panel.set(xlabel="false positive rate", ylabel="true positive rate")
        plain_numbers(panel.xaxis)
        figure.legend(loc="outside upper left")
        return save_figure(figure, folder, "roc")
