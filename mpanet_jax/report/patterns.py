"""Draws figure 3 of the paper: images of some people, and what each pattern attends to in them."""

import os
from pathlib import Path

import numpy as np
from jaxtyping import Float32

from mpanet_jax.errors import UserError
from mpanet_jax.modality import INFRARED, MODALITY_NAMES, VISIBLE
from mpanet_jax.report.figures import PHOTO_ASPECT, WIDTH_MM, new_figure, save_figure, show_photo
from mpanet_jax.report.pattern_maps import grad_cam, targets_of
from mpanet_jax.report.sources import Source


def rows_of_people(source: Source, pids: np.ndarray, seed: int) -> np.ndarray:
    """Choose a visible and an infrared image of each identity at random.

    Args:
      source: the images.
      pids: the identities; one that lacks a modality is shown in the other only.
      seed: seeds the choice.

    Returns:
      int[r], rows of `source.images`: for each identity the visible, then the infrared image.

    Raises:
      UserError: none of the identities has an image of known modality.
    """
    generator, rows = np.random.default_rng(seed), []
    for pid in pids:
        for modality in (VISIBLE, INFRARED):
            candidates = np.flatnonzero((source.images.pids == pid) & (source.modality == modality))
            if len(candidates):
                rows.append(generator.choice(candidates))
    if not rows:
        raise UserError(f"{source.title}: the people have no images of known modality; choose others")
    return np.array(rows)


def maps_of_rows(source: Source, rows: np.ndarray, *, plain: bool = False) -> Float32[np.ndarray, "r l h w"]:
    """The pattern maps of some images of `source`: Grad-CAM of M_k ⊙ F (`grad_cam`), or M_k itself with `plain`.

    Raises:
      UserError: there is no network, it makes no pattern maps, or an image is missing.
    """
    paths = [str(path) for path in source.images.paths[rows]]
    if plain or source.model is None:  # without a network, `pattern_maps` raises the right error
        return source.pattern_maps(paths)
    targets = targets_of(source.images.pids, source.modality, source.images.features, rows)
    return grad_cam(source.model, [source.photo(path) for path in paths], targets)


def draw_patterns(
    source: Source, pids: np.ndarray, folder: str | os.PathLike, *, seed: int = 0, plain: bool = False
) -> list[Path]:
    """Draw patterns.png and .svg (patterns_plain with `plain`): a row for each image, a column for each pattern.

    Args:
      source: images, and a network with PAM.
      pids: int[p], the identities to show, each by a visible and an infrared image in neighbouring rows.
      folder: the folder to write to.
      seed: seeds the choice of each identity's images.
      plain: show M_k itself instead of Grad-CAM of M_k ⊙ F (`grad_cam`).

    Returns:
      The paths of the two files.

    Raises:
      UserError: the network makes no pattern maps, an image is missing, or matplotlib is not installed.
    """
    rows = rows_of_people(source, pids, seed)
    paths = [str(path) for path in source.images.paths[rows]]
    maps = maps_of_rows(source, rows, plain=plain)
    columns = 1 + maps.shape[1]
    height = 7 + len(rows) * (WIDTH_MM - 6) / columns * PHOTO_ASPECT
    with new_figure(height) as figure:
        figure.get_layout_engine().set(w_pad=0.01, h_pad=0.01, wspace=0.02, hspace=0.02)
        axes = figure.subplots(len(rows), columns, squeeze=False)
        for line, (row, path) in enumerate(zip(rows, paths, strict=True)):
            photo = source.photo(path)
            for column, cell in enumerate(axes[line]):
                show_photo(cell, photo, maps[line, column - 1] if column else None)
                if not line:
                    cell.set_title("image" if not column else f"{column}", pad=2)
            camera = source.images.camids[row]
            where = f"{MODALITY_NAMES[int(source.modality[row])]}" + (f", camera {camera}" if camera >= 0 else "")
            axes[line, 0].set_ylabel(f"{source.name_of(row)}\n{where}", fontsize=6, labelpad=2)
        what = "Pattern maps M" if plain else "Grad-CAM of M ⊙ F"
        figure.suptitle(f"{what}: blue is least, yellow is greatest")
        return save_figure(figure, folder, "patterns_plain" if plain else "patterns")
