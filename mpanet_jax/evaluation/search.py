"""Search: which images of a gallery show what a query shows, by an index of the gallery that is kept on disk."""

import contextlib
import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np
from jaxtyping import Float32

from mpanet_jax.errors import ArgumentError, UserError
from mpanet_jax.evaluation.given_images import GivenImage, SkippedImage, listed_images
from mpanet_jax.evaluation.images import ImageFile, list_images, of_modality
from mpanet_jax.evaluation.index_files import IndexFiles, locked_index, map_rows, read_index, write_index
from mpanet_jax.evaluation.top_k import top_k, upload
from mpanet_jax.files import write_whole
from mpanet_jax.modality import MODALITY_NAMES, Modality, modality_numbers

CHUNK_BYTES = 2**27  # of rows that are embedded or copied at once
QUERIES_AT_ONCE = 512  # whose distances to a part of the gallery are held
RESULTS_FORMAT = {"format": "mpanet_jax search", "version": 1}


class Embedder(Protocol):
    """What an index needs of a `Model`."""

    source: str

    @property
    def fingerprint(self) -> str: ...

    @property
    def size(self) -> int: ...

    def embed(self, images: Iterable[GivenImage], **options: Any) -> Any: ...


@dataclass(frozen=True)
class Match:
    """An image of the gallery.

    Attributes:
      path: from the gallery's folder.
      distance: 1 − similarity, from 0 to 2.
      similarity: the cosine of the two embeddings.
      modality: 'visible', 'infrared', or '' where nothing says it.
    """

    path: str
    distance: float
    similarity: float
    modality: str = ""


@dataclass(frozen=True)
class Ranking:
    """A query and what was found for it, the nearest first."""

    path: str
    matches: tuple[Match, ...]


@dataclass(frozen=True)
class SearchResults:
    """What a search found.

    Attributes:
      model, fingerprint: of the model.
      gallery: the gallery's folder, list or images.csv, an absolute path.
      folder: the folder that the matches' paths start from.
      num_gallery: images in it that could be read.
      queries: in the order in which they were given.
      skipped: queries that could not be read.
    """

    model: str
    fingerprint: str
    gallery: str
    folder: str
    num_gallery: int
    queries: tuple[Ranking, ...]
    skipped: tuple[SkippedImage, ...] = ()

    def write(self, path: str | os.PathLike) -> None:
        """Writes them as JSON (docs/search.md), whole or not at all."""
        tree = {**RESULTS_FORMAT, "metric": "cosine", **asdict(self)}
        tree["skipped"] = [{"path": image.name, "reason": image.reason} for image in self.skipped]
        with write_whole(path) as file:
            file.write(json.dumps(tree, indent=2) + "\n")


class Index:
    """The embeddings of a gallery, on disk, and the search in them.

        index = mpanet_jax.Index.build(model, "gallery")  # embeds what is new or changed since the last time
        for ranking in index.search(["query.jpg"], top=10).queries:
            print(ranking.path, [match.path for match in ranking.matches])

    Attributes:
      model: whose embeddings they are.
      folder: of the index.
      gallery: the gallery's folder, list or images.csv.
      paths: str[N], of the images, from the gallery's folder, in the order of the rows.
      features: float32[N, D], rows of length 1, memory-mapped.
      skipped: (path, reason) of the images that could not be read.
      num_embedded: images that `build` embedded; the others it knew.
    """

    def __init__(self, model: Embedder, folder: Path, files: IndexFiles, num_embedded: int = 0):
        self.model, self.folder, self._files, self.num_embedded = model, folder, files, num_embedded
        self.gallery = Path(os.path.normpath(folder.absolute() / files.gallery))
        self.paths, self.skipped = files.paths, files.skipped
        self.features: Float32[np.ndarray, "n d"] = map_rows(folder, files, model.size)

    def __len__(self) -> int:
        return len(self.paths)

    @classmethod
    def load(cls, model: Embedder, folder: str | os.PathLike) -> "Index":
        """The index in a folder, as it is, without a look at the gallery.

        Raises:
          UserError: there is none, it is damaged, or another model made it.
        """
        folder = Path(folder)

        def opened() -> "Index":
            files = read_index(folder)
            if files is None:
                raise UserError(f"{folder}: no index; build one from its gallery, or name another index")
            _check_model(files, model, folder)
            return cls(model, folder, files)

        try:
            return opened()
        except UserError:  # an update may have replaced the rows after index.json was read: once more
            return opened()

    @classmethod
    def build(
        cls,
        model: Embedder,
        gallery: str | os.PathLike,
        *,
        index: str | os.PathLike | None = None,
        modality: str | None = None,
        rebuild: bool = False,
    ) -> "Index":
        """The index of a gallery, up to date: what is new or changed is embedded, what is gone leaves it.

        A file counts as changed where its size, its time of modification or what is said of its modality is another.
        One that was changed and has the old size and time looks unchanged; `rebuild` embeds all.

        Args:
          model: what `mpanet_jax.load` gives.
          gallery: a folder, a text file of paths, or an images.csv, as scripts/extract.py reads them.
          index: the index's folder; None: beside the gallery, its name and '.index', with a modality '.visible.index'
            or '.infrared.index'.
          modality: 'visible' or 'infrared': only the images of it, and those of which nothing says what they are.
          rebuild: embed all, whatever lies there.

        Raises:
          UserError: no gallery, no image in it that can be read, or an index of another model or gallery in `index`.
        """
        gallery = Path(gallery)
        images = list_images(gallery)
        if modality is not None:
            images = of_modality(images, int(modality_numbers(modality, 1)[0]))
        folder = Path(index) if index is not None else default_folder(gallery, modality)
        found = _files_of(images, _base(gallery))

        def read() -> IndexFiles | None:
            files = None if rebuild else read_index(folder)
            if files is not None:
                _check_model(files, model, folder)
                if (before := os.path.normpath(folder.absolute() / files.gallery)) != os.path.abspath(gallery):
                    raise UserError(f"{folder}: is the index of {before}; name another for this gallery, or rebuild it")
            return files

        files = read()
        if files is not None and _is_up_to_date(model, files, found):  # then no one has to be able to write there
            return cls.load(model, folder)
        with locked_index(folder):
            return cls(model, folder, *_updated(model, folder, gallery, found, read()))

    def search(
        self, images: Iterable[GivenImage], *, top: int = 10, modality: Modality | None = None, errors: str = "raise"
    ) -> SearchResults:
        """The `top` nearest images of the gallery for each of `images`, exactly, by the cosine of the embeddings.

        Equal distances are in the order of the index's rows. An image that lies in the gallery finds itself.

        Args:
          images, modality, errors: as of `Model.embed`.
          top: how many.

        Raises:
          UserError, ArgumentError: as `Model.embed`, or `top` is not a positive number.
        """
        if isinstance(top, bool) or not isinstance(top, int | np.integer) or top < 1:
            raise ArgumentError("top", f"= {top!r}: expected a positive whole number")
        if errors not in ("raise", "skip"):
            raise ArgumentError("errors", f"= {errors!r}: expected 'raise' or 'skip'")
        listed = listed_images(images)
        rows, skipped = self.model.embed(listed, modality=modality, errors="skip")
        if skipped and errors != "skip":
            raise UserError(f"{skipped[0].name}: {skipped[0].reason}; replace it, or leave it out")
        missing = {image.position for image in skipped}
        names = [_name(image, place) for place, image in enumerate(listed) if place not in missing]
        queries = []
        for start in range(0, len(rows), QUERIES_AT_ONCE):
            some = slice(start, start + QUERIES_AT_ONCE)
            nearest = top_k(rows[some], self.features, top, uploaded=self._uploaded)
            queries += [
                Ranking(name, tuple(self._match(int(p), float(d)) for p, d in zip(*found, strict=True)))
                for name, *found in zip(names[some], *nearest, strict=True)
            ]
        return SearchResults(
            self.model.source,
            self.model.fingerprint,
            str(self.gallery),
            str(_base(self.gallery)),
            len(self),
            tuple(queries),
            tuple(skipped),
        )

    def _match(self, row: int, distance: float) -> Match:
        modality = MODALITY_NAMES.get(self._files.modality[row], "")
        return Match(self.paths[row], distance, 1 - distance, modality)

    @cached_property
    def _uploaded(self) -> list[Any] | None:
        """The rows on an accelerator, once; None on CPUs, and where they do not fit."""
        device = jax.local_devices()[0]
        stats = None if device.platform == "cpu" else device.memory_stats()
        if not stats or 1.2 * self.features.nbytes > stats.get("bytes_limit", 0) - stats.get("bytes_in_use", 0):
            return None
        return upload(self.features)


def default_folder(gallery: Path, modality: str | None = None) -> Path:
    """Where the index of a gallery, or of its images of one modality, lies: beside it."""
    whole = Path(os.path.abspath(gallery))
    return whole.with_name(f"{whole.name}{f'.{modality}' if modality else ''}.index")


def _base(gallery: Path) -> Path:
    return gallery if gallery.is_dir() else gallery.parent


def _name(image: GivenImage, place: int) -> str:
    return os.path.abspath(image) if isinstance(image, str | os.PathLike) else f"images[{place}]"


def _check_model(files: IndexFiles, model: Embedder, folder: Path) -> None:
    if files.fingerprint != model.fingerprint:
        raise UserError(
            f"{folder}: is an index of another model, {files.model}, not of {model.source}; "
            "name another folder for the index, or rebuild this one"
        )


def _stored_path(image: ImageFile, base: Path) -> str:
    whole = Path(os.path.abspath(image.file))
    try:
        return whole.relative_to(os.path.abspath(base)).as_posix()
    except ValueError:
        return str(whole)


# By its stored path: an image, and what tells whether it has changed, (size, mtime in ns, modality).
Found = dict[str, tuple[ImageFile, tuple[int, int, int]]]


def _files_of(images: list[ImageFile], base: Path) -> Found:
    found: Found = {}
    for image in images:
        size = mtime = -1  # of a file that is not there, which is reported when it is read
        with contextlib.suppress(OSError, ValueError):
            status = os.stat(image.file)
            size, mtime = status.st_size, status.st_mtime_ns
        found.setdefault(_stored_path(image, base), (image, (size, mtime, image.modality)))
    return found


def _changes(before: IndexFiles, found: Found) -> tuple[list[int], list[str]]:
    """The rows of an index that stay, and the paths that are to be embedded."""
    known = zip(before.paths, before.sizes, before.mtimes_ns, before.modality, strict=True)
    kept = [row for row, (path, *state) in enumerate(known) if path in found and found[path][1] == tuple(state)]
    same = {before.paths[row] for row in kept}
    return kept, [path for path in found if path not in same]


def _at_once(model: Embedder) -> int:
    """How many images are embedded or copied at once: whole batches, of most sizes."""
    return max(256, CHUNK_BYTES // (4 * model.size) // 256 * 256)


def _is_up_to_date(model: Embedder, before: IndexFiles, found: Found) -> bool:
    kept, new = _changes(before, found)
    if len(kept) != len(before.paths) or sorted(new) != sorted(path for path, _ in before.skipped):
        return False
    # What could not be read is tried again: a file becomes readable without a change of its time.
    number = _at_once(model)
    return not any(len(_rows_of(model, found, new[i : i + number])[0]) for i in range(0, len(new), number))


def _updated(
    model: Embedder, folder: Path, gallery: Path, found: Found, before: IndexFiles | None
) -> tuple[IndexFiles, int]:
    """The index with what has changed, written, and how many images were embedded."""
    kept, new = ([], list(found)) if before is None else _changes(before, found)
    skipped: list[tuple[str, str]] = []
    number, num_embedded = _at_once(model), 0

    def blocks() -> Iterator[tuple[np.ndarray, dict[str, Any]]]:
        nonlocal num_embedded
        if before is not None and kept:
            rows = map_rows(folder, before, model.size)
            for start in range(0, len(kept), number):
                some = kept[start : start + number]
                yield rows[some], vars(before.take(some))
        for start in range(0, len(new), number):
            rows, faults = _rows_of(model, found, new[start : start + number])
            skipped.extend(faults)
            unread = {path for path, _ in faults}
            read = [path for path in new[start : start + number] if path not in unread]
            states = [found[path][1] for path in read]
            num_embedded += len(read)
            yield (
                rows,
                {"paths": read, **dict(zip(_STATE, zip(*states, strict=True) if read else [()] * 3, strict=True))},
            )
        if not kept and not num_embedded:
            raise UserError(f"{gallery}: none of its {len(found)} images can be read; no index is written")

    place = os.path.relpath(os.path.abspath(gallery), os.path.abspath(folder))
    files = IndexFiles(model.fingerprint, model.source, place, "", [], [], [], [], skipped)
    return write_index(folder, files, blocks()), num_embedded


_STATE = ("sizes", "mtimes_ns", "modality")


def _rows_of(model: Embedder, found: Found, paths: list[str]) -> tuple[np.ndarray, list[tuple[str, str]]]:
    """The rows of the images that can be read, and (path, reason) of the others."""
    images = [found[path][0] for path in paths]
    modality = [image.modality for image in images]
    rows, faults = model.embed([image.file for image in images], modality=modality, errors="skip")
    return rows, [(paths[fault.position], fault.reason) for fault in faults]
