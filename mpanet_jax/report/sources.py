"""Collects a picture's embeddings, photos and network from a training run, from a model and images, or from files."""

import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from mpanet_jax.data.decode import BadImageError, decode_rgb, read_image_file
from mpanet_jax.embeddings import Embeddings, check_embeddings
from mpanet_jax.errors import UserError
from mpanet_jax.evaluation.extract import make_embed
from mpanet_jax.evaluation.images import embeddings_of, list_images
from mpanet_jax.evaluation.verification import join_embeddings
from mpanet_jax.evaluation.workdir import embed_rows, open_run
from mpanet_jax.modality import MODALITY_NAMES, UNKNOWN
from mpanet_jax.model import NUM_IDS, Model, load
from mpanet_jax.progress import track
from mpanet_jax.protocol import Protocol
from mpanet_jax.report.retrieval import Ranking, UnknownSetting, rank_queries
from mpanet_jax.report.thumbnails import Photos, photos_of_split

_AT_ONCE = 128  # photos held in memory at once


@dataclass(frozen=True)
class Test:
    """Two sets of embeddings, and the protocol that compares them."""

    query: Embeddings
    gallery: Embeddings
    protocol: Protocol


@dataclass(frozen=True)
class Source:
    """Images, with everything that is known about them.

    Attributes:
      title: what pictures call them, such as the workdir's name.
      images: the embeddings of all N images, each once; features are not normalised.
      photos: gives the image at a path.
      model: the network; None if only embeddings are known.
      tests: make the tests that a run's results come from; empty for a folder of images.
      about: entries for the metrics of a run (`OpenRun.about`, 'flip').
      rerank: whether the run's results are re-ranked.
    """

    title: str
    images: Embeddings
    photos: Photos
    model: Model | None = None
    tests: Sequence[Callable[[], Test]] = ()
    about: dict[str, Any] = field(default_factory=dict)
    rerank: bool = False

    @cached_property
    def modality(self) -> np.ndarray:
        """int[N], the images' modality: 0 visible, 1 infrared, -1 unknown."""
        known = self.images.modality
        return np.full(len(self.images), UNKNOWN) if known is None else np.asarray(known)

    def name_of(self, row: int) -> str:
        """The data set's name for the identity of image `row`."""
        names = self.images.pid_names
        return str(self.images.pids[row]) if names is None else str(names[row])

    def pattern_maps(self, paths: Sequence[str]) -> np.ndarray:
        """The l pattern maps M of the images at n paths, float32[n, l, h, w].

        Raises:
          UserError: there is no network, it makes no pattern maps, or an image is missing.
        """
        if self.model is None:
            raise UserError(f"{self.title}: pattern maps need a network; give a run's workdir, or a model")
        row_of = {path: row for row, path in enumerate(self.images.paths.tolist())}
        parts = []
        starts = range(0, len(paths), _AT_ONCE)
        for start in track(starts, "pattern maps", len(paths), size=lambda _: _AT_ONCE):
            some = paths[start : start + _AT_ONCE]
            modality = modality_names(self.modality[[row_of[path] for path in some]]) if self._needs_modality else None
            parts.append(self.model.pattern_maps([self.photo(path) for path in some], modality=modality))
        return np.concatenate(parts)

    @property
    def _needs_modality(self) -> bool:
        return self.model is not None and self.model.method.needs_modality

    def photo(self, path: str) -> Image.Image:
        """The image at a path.

        Raises:
          UserError: it is missing or cannot be read.
        """
        photo = self.photos(path)
        if photo is None:
            raise UserError(
                f"{path}: no such image of {self.title}, or not readable; give the folder that the images are in"
            )
        return photo


def modality_names(numbers: np.ndarray) -> list[Any]:
    """The names of modalities: 'visible' for 0, 'infrared' for 1, None for any other number."""
    return [MODALITY_NAMES.get(int(number)) for number in numbers]


def source_of_run(workdir: str | Path, *, checkpoint: str = "last", data_dir: str | None = None) -> Source:
    """Embed the test set of a run with the network of one of its checkpoints.

    Arguments and errors are those of `evaluate_workdir`.
    """
    run = open_run(Path(workdir), checkpoint=checkpoint, data_dir=data_dir)
    model = Model(run.settings, run.variables, workdir)
    split, evaluations = run.tested.split, run.tested.evaluations
    rows = np.unique(np.concatenate([part for test in evaluations for part in (test.query, test.gallery)]))
    embed = make_embed(model.method, NUM_IDS)(model.variables)
    images = embed_rows(split, rows, embed, run.settings.data, run.settings.eval.batch_size)

    def test(evaluation: Any) -> Test:
        query, gallery = (images.take(np.searchsorted(rows, part)) for part in (evaluation.query, evaluation.gallery))
        return Test(query, gallery, evaluation.protocol)

    flip = {"flip": True} if run.settings.eval.flip else {}
    return Source(
        title=Path(workdir).resolve().name,
        images=images,
        photos=photos_of_split(split),
        model=model,
        tests=[lambda evaluation=evaluation: test(evaluation) for evaluation in evaluations],
        about={**run.about, **flip},
        rerank=run.settings.eval.rerank,
    )


def source_of_model(model: str | Path, images: str | os.PathLike, *, split: str = "") -> Source:
    """Embed the images of a folder, a list or an images.csv with a network.

    Images that cannot be read are left out, each with a line on stderr.

    Args:
      model: the network, as `load` takes it.
      images, split: the images, as `list_images` takes them.

    Raises:
      UserError: as for `load` and `list_images`, or no image can be read.
    """
    listed, network = list_images(images, split=split), load(model)
    modality = modality_names(np.array([image.modality for image in listed])) if network.method.needs_modality else None
    features, skipped = network.embed(
        [image.file for image in listed], modality=modality, normalize=False, errors="skip"
    )
    for image in skipped:
        print(f"skipped {image.name}: {image.reason}", file=sys.stderr)
    files = {image.path: image.file for image in listed}

    def photo(path: str) -> Image.Image | None:
        try:
            return decode_rgb(read_image_file(files[path])) if path in files else None
        except BadImageError:
            return None

    return Source(Path(images).resolve().name, embeddings_of(listed, features, skipped), photo, network)


def source_of_features(query: Embeddings, gallery: Embeddings, protocol: Protocol) -> Source:
    """Join two sets of embeddings from any framework; there are no photos and no network.

    Raises:
      UserError: the embeddings are unsound, or their lengths differ.
    """
    both = join_embeddings([check_embeddings(query), check_embeddings(gallery)])
    return Source(query.source, both, lambda path: None, tests=[lambda: Test(query, gallery, protocol)])


def rank_run(source: Source, *, setting: str | None = None, **options: Any) -> Ranking:
    """Call `rank_queries` on the test of a run that has a setting.

    Args:
      source: the run.
      setting: the setting's name; None: the first setting of the first test.
      options: further arguments of `rank_queries`.

    Raises:
      ArgumentError: no test has the setting, or as for `rank_queries`.
      UserError: the run has no test, or as for `rank_queries`.
    """
    fault = None
    for make_test in source.tests:
        test = make_test()
        try:
            return rank_queries(test.query, test.gallery, protocol=test.protocol, setting=setting, **options)
        except UnknownSetting as error:
            fault = error if fault is None else UnknownSetting(setting, fault.known + error.known)
    raise fault or UserError(f"{source.title}: has no test; expected a run or two files of embeddings")


def makes_maps(source: Source) -> bool:
    """Whether the source has a network that makes pattern maps."""
    if source.model is None:
        return False
    try:
        source.model.pattern_maps([])
    except UserError:
        return False
    return True
