"""Plain image files: find them, and say of each what its list or its folder says."""

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

# What counts as an image in a folder; in a list every line does.
SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp", ".gif", ".ppm", ".pgm")


@dataclass(frozen=True)
class ImageFile:
    """An image to embed.

    Attributes:
      file: where it lies.
      path: what the embeddings file calls it: its path as listed, or relative to the folder that was named. Where that
        leaves out a part of a known layout ('0007/0003.jpg' of the folder cam3), the layout's: 'cam3/0007/0003.jpg'.
      pid, camid, modality: what images.csv or a known layout says (SYSU-MM01: cam3/0007/0003.jpg; LLCM:
        test_vis/cam3/0007/name.jpg; RegDB: Visible/7/name.bmp is camera 1, Thermal/7/name.bmp camera 2); -1, unknown,
        in any other folder.
      pid_name: what images.csv calls the identity.
    """

    file: Path
    path: str
    pid: int = UNKNOWN
    camid: int = UNKNOWN
    modality: int = UNKNOWN
    pid_name: str = ""


def list_images(source: str | os.PathLike, *, split: str = "") -> list[ImageFile]:
    """The images of a folder, of a list file or of a CSV.

    Args:
      source: a folder: all files in it and below it whose names end as `SUFFIXES` (in any case) and do not begin with a
        dot, sorted by path; links are followed. Or a UTF-8 text file with one path a line, absolute or relative to the
        file's folder, in its order; blank lines are nothing. Or an images.csv (`datasets/own.py`), whose pids are
        numbered as they are when it is prepared.
      split: of an images.csv the lines of this split alone; '': all.

    Raises:
      UserError: no such folder or file, no text, a fault in a CSV, or no images in it.
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
    """The images that are of `modality`, and those of which nothing is known, which are taken to be.

    Raises:
      UserError: all are of the other.
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
    if real in above:  # a link to a folder that it lies in
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
    except OSError:  # a link that leads to itself; as an image it is reported when it is read
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
    """What is known of listed images beside their `features`, of which the skipped ones have none.

    Raises:
      UserError: all were skipped.
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
