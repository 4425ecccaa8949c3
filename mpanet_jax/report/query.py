"""Draws one query: its first results, right and wrong, and what each pattern attends to in it."""

import os
from pathlib import Path

import numpy as np

from mpanet_jax.errors import ArgumentError, UserError
from mpanet_jax.report.figures import BLUE, PHOTO_ASPECT, VERMILION, WIDTH_MM, new_figure, save_figure, show_photo
from mpanet_jax.report.patterns import maps_of_rows
from mpanet_jax.report.retrieval import NOBODY, Ranking
from mpanet_jax.report.sources import Source, makes_maps

SHOWN = 5  # results of the query


def choose_query(ranking: Ranking, path: str | None, seed: int) -> int:
    """Find a query by its path, or choose one that has a right image in the gallery at random.

    Args:
      ranking: the rankings of all queries.
      path: the path of the query's image, as the data set gives it; None: a random one.
      seed: seeds the choice.

    Returns:
      Its row in `ranking.query`.

    Raises:
      ArgumentError: no query has this path.
    """
    paths = ranking.query.paths.tolist()
    if path is None:
        return int(np.random.default_rng(seed).choice(np.flatnonzero(ranking.scores.matches)))
    if path not in paths:
        raise ArgumentError(
            "query", f"= {path}: no query of {ranking.setting} has this path; it has {', '.join(paths[:3])} …"
        )
    return paths.index(path)


def draw_query(
    source: Source, ranking: Ranking, query: int, folder: str | os.PathLike, *, plain: bool = False
) -> list[Path]:
    """Draw query.png and .svg: a query and its first five results, and below it the pattern maps of the query.

    A right result has a solid frame and ✓, a wrong one a dashed frame and ✗; below it are its place, its distance and
    the name of its identity. A network without PAM has no second row.

    Args:
      source: the images, and the network that embedded them.
      ranking: what `rank_run` gives of it.
      query: a row of `ranking.query`.
      folder: the folder to write to.
      plain: show M_k itself instead of Grad-CAM of M_k ⊙ F (`grad_cam`).

    Returns:
      The paths of the two files.

    Raises:
      UserError: an image is missing, or matplotlib is not installed.
    """
    row_of = {path: row for row, path in enumerate(source.images.paths.tolist())}
    own = row_of[str(ranking.query.paths[query])]
    results = [int(row) for row in ranking.top[query, :SHOWN] if row != NOBODY]
    if not results:
        raise UserError(f"{source.title}: the protocol leaves query {ranking.query.paths[query]} no image to rank")
    maps = maps_of_rows(source, np.array([own]), plain=plain)[0] if makes_maps(source) else []
    columns = max(1 + SHOWN, len(maps))
    photo_height = (WIDTH_MM - 6) / columns * PHOTO_ASPECT
    with new_figure(18 + photo_height + (4 + photo_height if len(maps) else 0)) as figure:
        figure.get_layout_engine().set(w_pad=0.02, h_pad=0.01, wspace=0.02, hspace=0.02)
        axes = figure.subplots(2 if len(maps) else 1, columns, squeeze=False)
        for cell in axes.flat:
            cell.set_axis_off()
        first = axes[0, 0]
        first.set_axis_on()
        show_photo(first, source.photo(str(source.images.paths[own])))
        first.set_title("query", pad=2)
        first.set_xlabel(source.name_of(own), fontsize=6, labelpad=2)
        for place, row in enumerate(results):
            cell, right = axes[0, 1 + place], ranking.gallery.pids[row] == ranking.query.pids[query]
            path = str(ranking.gallery.paths[row])
            cell.set_axis_on()
            show_photo(cell, source.photo(path))
            cell.spines[:].set(visible=True, linewidth=1.5, color=BLUE if right else VERMILION)
            cell.spines[:].set_linestyle("-" if right else (0, (2, 1.5)))
            cell.set_title(f"{place + 1} {'✓' if right else '✗'}", pad=2, color=BLUE if right else VERMILION)
            distance = ranking.distances[query, place]
            cell.set_xlabel(f"{source.name_of(row_of[path])}\n{distance:.3f}", fontsize=6, labelpad=2)
        for pattern, heat in enumerate(maps):
            cell = axes[1, pattern]
            cell.set_axis_on()
            show_photo(cell, source.photo(str(source.images.paths[own])), heat)
            cell.set_title(f"pattern {pattern + 1}", pad=2)
        number = "1 − cosine" if ranking.metric == "cosine" else "Euclidean distance"
        title = f"{ranking.setting}, below: identity and {number}"
        if len(maps):
            what = "Pattern maps M" if plain else "Grad-CAM of M ⊙ F"
            title += f"\n{what} of the query: blue is least, yellow greatest"
        figure.suptitle(title)
        return save_figure(figure, folder, "query")
