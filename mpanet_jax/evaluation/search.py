"""Search: finds the images of a gallery that show who a query shows, with an index of the gallery kept on disk."""

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

QUERIES_AT_ONCE = 512  # queries whose distances to a block of the gallery are held in memory
RESULTS_FORMAT = {"format": "mpanet_jax search", "version": 1}


@dataclass(frozen=True)
class Match:
    """An image of the gallery that was found for a query.

    Attributes:
      path: its path from the gallery's folder.
      distance: 1 − similarity, from 0 to 2.
      similarity: the cosine of the two embeddings, from −1 to 1.
      modality: 'visible', 'infrared', or '' if unknown.
    """

    path: str
    distance: float
    similarity: float
    modality: str = ""


@dataclass(frozen=True)
class Ranking:
    """A query, by its path or 'images[3]', and the matches found for it, the nearest first."""

    path: str
    matches: tuple[Match, ...]


@dataclass(frozen=True)
class SearchResults:
    """What a search found.

    Attributes:
      model, fingerprint: where the model was read from, and its `Model.fingerprint`.
      gallery: the absolute path of the gallery: a folder, a list or an images.csv.
      folder: the folder that the matches' paths start from.
      num_gallery: the number of images in the index.
      queries: one ranking for each query that could be read, in the order given.
      skipped: the queries that could not be read.
    """

    model: str
    fingerprint: str
    gallery: str
    folder: str
    num_gallery: int
    queries: tuple[Ranking, ...]
    skipped: tuple[SkippedImage, ...] = ()

    def write(self, path: str | os.PathLike) -> None:
        """Write the results as JSON (docs/search.md); the file appears whole or not at all."""
        tree = {**RESULTS_FORMAT, "metric": "cosine", **asdict(self)}
        tree["skipped"] = [{"path": image.name, "reason": image.reason} for image in self.skipped]
        with write_whole(path) as file:
            file.write(json.dumps(tree, indent=2) + "\n")


class Index:
    """The embeddings of a gallery, kept on disk, and the search among them.

        index = mpanet_jax.Index.build(model, "gallery")  # embeds what is new or changed since the last time
        for ranking in index.search(["query.jpg"], top=10).queries:
            print(ranking.path, [match.path for match in ranking.matches])

    Attributes:
      model: the model that made the embeddings, and that embeds queries.
      folder: the index's folder.
      gallery: the gallery's folder, list or images.csv.
      paths: str[N], the images' paths from the gallery's folder, in the order of the rows.
      features: float32[N, D], rows of length 1, memory-mapped.
      skipped: (path, reason) of each image of the gallery that could not be read.
      num_embedded: how many images `build` embedded; the others were in the index already.
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
        """Open the index in a folder as it is, without checking the gallery for changes.

        Raises:
          UserError: the folder has no index, or it is damaged, or another model or precision made it.
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
        except UserError:  # an update may have replaced the rows after index.json was read: try once more
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
        """Bring the index of a gallery up to date and open it; the first call makes it.

        New and changed images are embedded, and images that are gone leave the index. A file counts as changed if its
        size, its time of modification or its known modality is different. A file that was changed but kept its size and
        time looks unchanged: `rebuild` embeds it too.

        Args:
          model: what `mpanet_jax.load` gives.
          gallery: a folder, a text file of paths, or an images.csv, as scripts/extract.py reads them.
          index: the index's folder; None: beside the gallery, under its name with '.index' added, or '.visible.index'
            or '.infrared.index' with a modality.
          modality: 'visible' or 'infrared': take only the gallery's images of it, and those of unknown modality.
          rebuild: embed all images, whatever is in the index's folder.

        Raises:
          UserError: there is no gallery, or none of its images can be read; or the existing index is damaged, or of
            another model, precision (`Model.dtype`) or gallery, and `rebuild` is False.
          ArgumentError: `modality` is unknown, or no image is of it.
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
                    raise UserError(f"{folder}: is the index of {before}; give this gallery another, or rebuild it")
            return files

        files = read()
        if files is not None and is_up_to_date(model, files, found):  # needs no permission to write
            return cls.load(model, folder)
        with locked_index(folder):
            return cls(model, folder, *write_update(model, folder, gallery, found, read()))

    def search(
        self, images: Iterable[GivenImage], *, top: int = 10, modality: Modality | None = None, errors: str = "raise"
    ) -> SearchResults:
        """Find the `top` images of the gallery that are most similar to each query; the search is exact.

        Similarity is the cosine of the embeddings. Equal distances keep the order of the index's rows. An image that is
        in the gallery finds itself.

        Args:
          images: the queries, as `Model.embed` takes them.
          top: how many images to find for each query.
          modality: the queries' modality, as `Model.embed` takes it.
          errors: what to do with queries that cannot be read: 'raise' an error, or 'skip' them.

        Raises:
          UserError: with errors='raise', a query cannot be read.
          ArgumentError: as for `Model.embed`, or `top` is not a positive whole number.
        """
        if isinstance(top, bool) or not isinstance(top, int | np.integer) or top < 1:
            raise ArgumentError("top", f"= {top!r}: expected a positive whole number")
        if errors not in ("raise", "skip"):
            raise ArgumentError("errors", f"= {errors!r}: expected 'raise' or 'skip'")
        listed = listed_images(images)
        rows, skipped = self.model.embed(listed, modality=modality, errors="skip")
        if skipped and errors != "skip":
            raise UserError(f"{skipped[0].name}: {skipped[0].reason}; replace it, or skip it with errors='skip'")
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
        """The rows, copied to an accelerator once; None without one, and where they do not fit."""
        device = jax.local_devices()[0]
        stats = None if device.platform == "cpu" else device.memory_stats()
        if not stats or 1.2 * self.features.nbytes > stats.get("bytes_limit", 0) - stats.get("bytes_in_use", 0):
            return None
        return upload(self.features)


def default_folder(gallery: Path, modality: str | None = None) -> Path:
    """The default folder of a gallery's index, or of the index of its images of one modality: beside the gallery."""
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
            "give another folder for the index, or rebuild this one"
        )
    if files.dtype != model.dtype:
        raise UserError(
            f"{folder}: its rows were computed in {files.dtype}, and {model.source} computes in {model.dtype} here; "
            f"load the model with dtype {files.dtype}, or rebuild the index"
        )
