"""Updates an index: finds the images that are new or changed, and embeds only those."""

import contextlib
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from mpanet_jax.errors import UserError
from mpanet_jax.evaluation.given_images import GivenImage
from mpanet_jax.evaluation.images import ImageFile
from mpanet_jax.evaluation.index_files import IndexFiles, map_rows, write_index

BLOCK_BYTES = 2**27  # of rows that are embedded or copied at once


class Embedder(Protocol):
    """What an index needs of a `Model`."""

    source: str

    @property
    def fingerprint(self) -> str: ...

    @property
    def dtype(self) -> str: ...

    @property
    def size(self) -> int: ...

    def embed(self, images: Iterable[GivenImage], **options: Any) -> Any: ...


class GalleryFile(NamedTuple):
    """An image of the gallery, and what tells whether it has changed since it was embedded.

    Attributes:
      image: where it lies, and what is known of it.
      state: (size in bytes, time of modification in ns since 1970, modality); size and time are -1 where there is no
        such file.
    """

    image: ImageFile
    state: tuple[int, int, int]


_STATE_COLUMNS = ("sizes", "mtimes_ns", "modality")  # of `IndexFiles`, in the order of `GalleryFile.state`


def files_of_gallery(images: list[ImageFile], base: Path) -> dict[str, GalleryFile]:
    """The images of a gallery by the paths that its index stores, each once.

    Args:
      images: as the gallery lists them.
      base: the folder that stored paths start from; an image outside of it is stored under its absolute path.
    """
    found: dict[str, GalleryFile] = {}
    for image in images:
        size = mtime = -1  # a missing file: reading it reports it
        with contextlib.suppress(OSError, ValueError):
            status = os.stat(image.file)
            size, mtime = status.st_size, status.st_mtime_ns
        found.setdefault(_stored_path(image, base), GalleryFile(image, (size, mtime, image.modality)))
    return found


def _stored_path(image: ImageFile, base: Path) -> str:
    whole = Path(os.path.abspath(image.file))
    try:
        return whole.relative_to(os.path.abspath(base)).as_posix()
    except ValueError:
        return str(whole)


def is_up_to_date(model: Embedder, before: IndexFiles, found: Mapping[str, GalleryFile]) -> bool:
    """Whether an update of the index would write what is already there.

    Images that could not be read are tried again: a file may become readable without a change of its time.
    """
    kept, new = _compare(before, found)
    if len(kept) != len(before.paths) or sorted(new) != sorted(path for path, _ in before.skipped):
        return False
    number = _images_per_block(model)
    return not any(len(_embed_files(model, found, new[i : i + number])[0]) for i in range(0, len(new), number))


def write_update(
    model: Embedder, folder: Path, gallery: Path, found: Mapping[str, GalleryFile], before: IndexFiles | None
) -> tuple[IndexFiles, int]:
    """Write the index of the images `found`; rows of unchanged images are copied, the others are embedded.

    Args:
      model: it embeds what is new or changed.
      folder: the index's folder, locked (`locked_index`).
      gallery: the gallery's path, as the index stores it.
      found: what `files_of_gallery` gives.
      before: the index that is there; None: everything is embedded.

    Returns:
      The index as written, and the number of images that were embedded.

    Raises:
      UserError: none of the images can be read.
    """
    kept, new = ([], list(found)) if before is None else _compare(before, found)
    skipped: list[tuple[str, str]] = []
    number, num_embedded = _images_per_block(model), 0

    def blocks() -> Iterator[tuple[np.ndarray, dict[str, Any]]]:
        nonlocal num_embedded
        if before is not None and kept:
            rows = map_rows(folder, before, model.size)
            for start in range(0, len(kept), number):
                some = kept[start : start + number]
                yield rows[some], vars(before.take(some))
        for start in range(0, len(new), number):
            rows, faults = _embed_files(model, found, new[start : start + number])
            skipped.extend(faults)
            unread = {path for path, _ in faults}
            read = [path for path in new[start : start + number] if path not in unread]
            num_embedded += len(read)
            states = zip(*(found[path].state for path in read), strict=True) if read else [()] * len(_STATE_COLUMNS)
            yield rows, {"paths": read, **dict(zip(_STATE_COLUMNS, states, strict=True))}
        if not kept and not num_embedded:
            raise UserError(f"{gallery}: none of its {len(found)} images can be read; no index is written")

    place = os.path.relpath(os.path.abspath(gallery), os.path.abspath(folder))
    files = IndexFiles(model.fingerprint, model.dtype, model.source, place, "", [], [], [], [], skipped)
    return write_index(folder, files, blocks()), num_embedded


def _compare(before: IndexFiles, found: Mapping[str, GalleryFile]) -> tuple[list[int], list[str]]:
    """The rows of an index that are still right, and the paths of the images that have to be embedded."""
    known = zip(before.paths, before.sizes, before.mtimes_ns, before.modality, strict=True)
    kept = [row for row, (path, *state) in enumerate(known) if path in found and found[path].state == tuple(state)]
    unchanged = {before.paths[row] for row in kept}
    return kept, [path for path in found if path not in unchanged]


def _images_per_block(model: Embedder) -> int:
    """How many images are embedded or copied at once: whole batches, for most batch sizes."""
    return max(256, BLOCK_BYTES // (4 * model.size) // 256 * 256)


def _embed_files(
    model: Embedder, found: Mapping[str, GalleryFile], paths: list[str]
) -> tuple[np.ndarray, list[tuple[str, str]]]:
    """Rows float32[n, D] of the images that can be read, in their order, and (path, reason) of the others."""
    images = [found[path].image for path in paths]
    modality = [image.modality for image in images]
    rows, faults = model.embed([image.file for image in images], modality=modality, errors="skip")
    return rows, [(paths[fault.position], fault.reason) for fault in faults]
