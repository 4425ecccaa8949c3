"""Draws figure 4 of the paper: the embeddings of ten people's images in two dimensions, by t-SNE."""

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float

from mpanet_jax.errors import ArgumentError, UserError
from mpanet_jax.modality import INFRARED, VISIBLE
from mpanet_jax.report.figures import COLOURS, WIDTH_MM, new_figure, save_figure
from mpanet_jax.report.people import choose_people, people_with_both
from mpanet_jax.report.requirements import require_report
from mpanet_jax.report.sources import Source
from mpanet_jax.row_norms import l2_normalize

MARKERS = {VISIBLE: ("o", "visible"), INFRARED: ("^", "infrared")}


def tsne_coordinates(features: np.ndarray, *, perplexity: float, seed: int) -> Float[np.ndarray, "n 2"]:
    """Place n embeddings in two dimensions by t-SNE, starting from their first two principal components.

    Args:
      features: float[n, D]; they are L2-normalised first.
      perplexity: t-SNE's number of effective neighbours, less than n.
      seed: seeds t-SNE.

    Raises:
      UserError: scikit-learn is not installed, or `perplexity` is not less than n.
    """
    require_report("sklearn")
    from sklearn.manifold import TSNE

    if len(features) <= perplexity:
        raise UserError(f"perplexity = {perplexity:g}: must be less than the number of images, {len(features)}")
    tsne = TSNE(perplexity=perplexity, init="pca", random_state=seed, n_jobs=1)
    return tsne.fit_transform(l2_normalize(features))


def draw_tsne(
    sources: Sequence[Source],
    folder: str | os.PathLike,
    *,
    titles: Sequence[str] | None = None,
    num_identities: int = 10,
    perplexity: float = 30.0,
    seed: int = 0,
) -> list[Path]:
    """Draw tsne.png and .svg: a panel for each source, with circles for visible and triangles for infrared images.

    Every identity has a colour.

    Args:
      sources: networks to compare, with embeddings of the same images.
      folder: the folder to write to.
      titles: the panels' titles; None: the sources' titles.
      num_identities: how many people to choose at random among those that all sources have in both modalities; at most
        ten, since no more colours can be told apart.
      perplexity: t-SNE's perplexity, lowered to (n − 1) / 3 where a panel has n images and that is less.
      seed: seeds the choice of people, and t-SNE.

    Returns:
      The paths of the two files.

    Raises:
      UserError: there are fewer identities than that, or scikit-learn or matplotlib is not installed.
      ArgumentError: `num_identities` is not from 1 to 10.
    """
    if not 1 <= num_identities <= len(COLOURS):
        raise ArgumentError("num_identities", f"= {num_identities}: expected 1 to {len(COLOURS)}, one for each colour")
    candidates = people_with_both(sources[0])
    for source in sources[1:]:
        candidates = np.intersect1d(candidates, people_with_both(source))
    pids = choose_people(candidates, num_identities, seed, sources[0].title)
    with new_figure(8 + min(62.0, WIDTH_MM / len(sources)) + 8) as figure:
        axes = figure.subplots(1, len(sources), squeeze=False)[0]
        for source, panel, title in zip(sources, axes, titles or [s.title for s in sources], strict=True):
            rows = np.flatnonzero(np.isin(source.images.pids, pids) & (source.modality >= 0))
            points = tsne_coordinates(
                source.images.features[rows], perplexity=min(perplexity, (len(rows) - 1) / 3), seed=seed
            )
            for colour, pid in zip(COLOURS, pids, strict=False):
                for modality, (marker, word) in MARKERS.items():
                    chosen = (source.images.pids[rows] == pid) & (source.modality[rows] == modality)
                    collection = panel.scatter(
                        *points[chosen].T, s=7, marker=marker, c=colour, linewidths=0.25, edgecolors="white"
                    )
                    name = source.name_of(int(np.flatnonzero(source.images.pids == pid)[0]))
                    collection.set_gid(f"{word} {name}")
            panel.set(xticks=[], yticks=[], title=title)
            panel.margins(0.04)
            panel.spines[:].set_visible(True)
        handles = [
            axes[0].scatter([], [], s=9, marker=marker, c="#555555", label=word) for marker, word in MARKERS.values()
        ]
        figure.legend(handles=handles, loc="outside lower center", ncols=2, handletextpad=0.1)
        return save_figure(figure, folder, "tsne")
