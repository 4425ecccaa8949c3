"""Finds image files, with what their list or their folder says about each of them."""

import dataclasses
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mpanet_jax.datasets import record_of_path
from mpanet_jax.datasets.own import CSV_FILE, read_csv
from mpanet_jax.datasets.raw import raise_fault
from mpanet_jax.embeddings import Embeddings
from mpanet_jax.errors import ArgumentError, UserError
from mpanet_jax.evaluation.given_images import SkippedImage
from mpanet_jax.modality import MODALITY_NAMES, UNKNOWN

# What counts as an image in a folder; in a list every line is one.
SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp", ".gif", ".ppm", ".pgm")


@dataclass(frozen=True)
class ImageFile:
    """An image to embed.

    Attributes:
      file: the file to read.
      path: its name in an embeddings file: the path as listed, or the path from the folder that was given. If that
        leaves out a part of a known layout, such as '0007/0003.jpg' in the folder cam3, the missing part is put back:
        'cam3/0007/0003.jpg'.
      pid, camid, modality: what images.csv or a known layout says (SYSU-MM01: cam3/0007/0003.jpg; LLCM:
        test_vis/cam3/0007/name.jpg; RegDB: Visible/7/name.bmp is camera 1, Thermal/7/name.bmp camera 2); in any other
        folder -1, unknown.
      pid_name: the identity's name in images.csv; '' elsewhere.
    """

    file: Path
    path: str
    pid: int = UNKNOWN
    camid: int = UNKNOWN
    modality: int = UNKNOWN
    pid_name: str = ""


def list_images(source: str | os.PathLike, *, split: str = "") -> list[ImageFile]:
    """List the images of a folder, of a text file of paths or of an images.csv.

    Args:
      source: a folder, a list or a CSV. Of a folder: all files in it and below it whose names end in one of `SUFFIXES`
        (in upper or lower case) and do not begin with a dot, sorted by path; links are followed. A list is a UTF-8 text
        file with one path a line, absolute or relative to the list's folder; its order is kept, and blank lines are
        skipped. A CSV is an images.csv (`datasets/own.py`); its pids get the numbers that preparing it gives them.
      split: only the lines of this split of an images.csv; '': all lines.

    Raises:
      UserError: the folder or file does not exist, is not UTF-8 text, is a faulty CSV, or has no images.
      ArgumentError: `split` with a `source` that is not a CSV, or one that the CSV does not have.
    """
    source = Path(source)
    if source.suffix == ".csv":
        return _listed_in_csv(source, split)
    if split:
        raise ArgumentError("split", f"= {split!r}: only a {CSV_FILE} has splits; leave it out for {source}")
    if source.is_dir():
        names = sorted(_walk(source, Path()))
        folder, expected = source, f"files that end in {', '.join(SUFFIXES)}"
    else:
        folder, expected = source.parent, "one path a line"
        try:
            names = [line.strip() for line in source.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
        except FileNotFoundError:
            raise UserError(f"{source}: no such folder or list file") from None
        except (UnicodeDecodeError, OSError) as error:
            reason = "not a UTF-8 text file" if isinstance(error, UnicodeDecodeError) else error.strerror
            raise UserError(f"{source}: {reason}; expected a folder or a text file of paths") from error
    if not names:
        raise UserError(f"{source}: no images found; expected {expected}")
    return [_image_file(folder, name) for name in names]


def keep_modality(images: list[ImageFile], modality: int) -> list[ImageFile]:
    """Keep the images of a modality, and those of unknown modality, which are then taken to be of it.

    Args:
      images: what `list_images` gives.
      modality: 0 visible, 1 infrared.

    Raises:
      ArgumentError: all images are of the other modality.
    """
    kept = [dataclasses.replace(image, modality=modality) for image in images if image.modality in (modality, UNKNOWN)]
    if not kept:
        raise ArgumentError("modality", f"= {MODALITY_NAMES[modality]}: all {len(images)} images are of the other one")
    return kept


def _listed_in_csv(source: Path, split: str) -> list[ImageFile]:
    records = read_csv(source.parent, raise_fault, source.name)
    images = [
        ImageFile(source.parent / r.path, r.path, r.pid, r.camid, r.modality, r.pid_name)
        for r in records
        if split in ("", r.part)
    ]
    if not images:
        splits = ", ".join(sorted({record.part for record in records})) or "no lines"
        raise ArgumentError("split", f"= {split!r}: {source} has no such images; it has {splits}")
    return images


def _walk(root: Path, below: Path, above: frozenset[str] = frozenset()) -> Iterator[str]:
    folder = root / below
    real = os.path.realpath(folder)
    if real in above:  # a link to a folder that contains it
        return
    try:
        entries = [entry for entry in os.scandir(folder) if not entry.name.startswith(".")]
    except OSError as error:
        raise UserError(f"{folder}: {error.strerror}; make the folder readable, or list the images") from error
    for entry in entries:
        if _is_folder(entry):
            yield from _walk(root, below / entry.name, above | {real})
        elif entry.name.lower().endswith(SUFFIXES):
            yield (below / entry.name).as_posix()


def _is_folder(entry: os.DirEntry) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself; it counts as an image, and reading that reports the fault
        return False


def _image_file(folder: Path, name: str) -> ImageFile:
    file = folder / name
    whole = Path(os.path.abspath(file)).as_posix()
    record = record_of_path(whole)
    if record is None:
        return ImageFile(file, name)
    path = name if name.endswith(record.path) else record.path
    return ImageFile(file, path, record.pid, record.camid, record.modality)


def embeddings_of(images: list[ImageFile], features: np.ndarray, skipped: Sequence[SkippedImage] = ()) -> Embeddings:
    """Join listed images and their features.

    Args:
      images: what `list_images` gives.
      features: float32[N, D] of the images that were not skipped, in their order.
      skipped: the images that could not be read.

    Raises:
      UserError: all images were skipped.
    """
    left_out = {image.position for image in skipped}
    kept = [image for place, image in enumerate(images) if place not in left_out]
    if not kept:
        raise UserError(f"none of the {len(images)} images can be read; nothing is written")
    names = [image.pid_name for image in kept]
    return Embeddings(
        features,
        np.array([image.pid for image in kept]),
        np.array([image.camid for image in kept]),
        np.array([image.path for image in kept], np.str_),
        np.array([image.modality for image in kept]),
        np.array(names, np.str_) if any(names) else None,
    )
