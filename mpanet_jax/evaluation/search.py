"""Search: which images of a gallery show what a query shows, by an index of the gallery that is kept on disk."""

import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Float32

from mpanet_jax.errors import ArgumentError, UserError
from mpanet_jax.evaluation.given_images import GivenImage, SkippedImage, listed_images
from mpanet_jax.evaluation.images import keep_modality, list_images
from mpanet_jax.evaluation.index_files import IndexFiles, locked_index, map_rows, read_index
from mpanet_jax.evaluation.index_update import Embedder, files_of_gallery, is_up_to_date, write_update
from mpanet_jax.evaluation.top_k import top_k, upload
from mpanet_jax.files import write_whole
from mpanet_jax.modality import MODALITY_NAMES, Modality, modality_numbers

QUERIES_AT_ONCE = 512  # whose distances to a part of the gallery are held
RESULTS_FORMAT = {"format": "mpanet_jax search", "version": 1}


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
          UserError: there is none, it is damaged, or another model or precision made it.
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
          UserError: there is no gallery, or none of its images can be read; or the index that is there is of another
            model, precision (`Model.dtype`) or gallery, or damaged, and `rebuild` is False.
        """
        gallery = Path(gallery)
        images = list_images(gallery)
        if modality is not None:
            images = keep_modality(images, int(modality_numbers(modality, 1)[0]))
        folder = Path(index) if index is not None else default_folder(gallery, modality)
        found = files_of_gallery(images, _base(gallery))

        def read() -> IndexFiles | None:
            files = None if rebuild else read_index(folder)
            if files is not None:
                _check_model(files, model, folder)
                if (before := os.path.normpath(folder.absolute() / files.gallery)) != os.path.abspath(gallery):
                    raise UserError(f"{folder}: is the index of {before}; name another for this gallery, or rebuild it")
            return files

        files = read()
        if files is not None and is_up_to_date(model, files, found):  # then no one has to be able to write there
            return cls.load(model, folder)
        with locked_index(folder):
            return cls(model, folder, *write_update(model, folder, gallery, found, read()))

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
    if files.dtype != model.dtype:
        raise UserError(
            f"{folder}: its rows were computed in {files.dtype}, and {model.source} computes in {model.dtype} here; "
            f"load the model with dtype {files.dtype}, or rebuild the index"
        )
