"""What the retrieval page shows: its images, its queries with their rankings, and its figures, as plain values."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from mpanet_jax.embeddings import Embeddings
from mpanet_jax.errors import UserError
from mpanet_jax.evaluation.metrics_output import describe_measurement
from mpanet_jax.modality import UNKNOWN
from mpanet_jax.report.retrieval import NOBODY, Ranking


@dataclass(frozen=True)
class ShownImage:
    """An image that the page shows.

    Attributes:
      path: the path of its file.
      identity: the name of the person it shows; '' is unknown.
      camera, modality: their numbers; -1 is unknown.
      person: the pid, which decides whether an image is right or wrong, since two people may have the same name; -1 is
        unknown.
    """

    path: str
    identity: str = ""
    camera: int = UNKNOWN
    modality: int = UNKNOWN
    person: int = UNKNOWN


@dataclass(frozen=True)
class Query:
    """A query of the page. Images are given by their index in `Page.images`.

    Attributes:
      image: the query image.
      top, distances: the first images of its ranking, and their distances from the query.
      matches: how many right images its gallery holds; None where identities are unknown.
      position: the place of the first right image, from 1, when every image counts.
      rank: the same as the CMC counts it (`Ranking.rank`).
      average_precision: from 0 to 1.
      first, first_distance: the first right image and its distance; `NOBODY` and NaN where there is none.
    """

    image: int
    top: Sequence[int]
    distances: Sequence[float]
    matches: int | None = None
    position: int = 0
    rank: int = 0
    average_precision: float = 0.0
    first: int = NOBODY
    first_distance: float = float("nan")


@dataclass(frozen=True)
class Page:
    """What the page shows.

    Attributes:
      title, protocol: its first two lines.
      images: every image on the page, once.
      queries: in the order of the query set.
      distance: what the numbers below the images are, such as '1 − cosine'.
      figures: (name, value, detail) of each figure at the top of the page, as text.
      notes: lines of warning.
    """

    title: str
    protocol: str
    images: list[ShownImage]
    queries: list[Query]
    distance: str
    figures: list[tuple[str, str, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def page_of_ranking(ranking: Ranking, title: str, more: Mapping[str, Any] | None = None) -> Page:
    """The page of one trial's rankings.

    Args:
      ranking: what `rank_queries` gives.
      title: the page's first line.
      more: entries for `describe_measurement` that the ranking does not know: 'checkpoint', 'flip', 'dataset' …

    Raises:
      UserError: query and gallery have an image under the same path with different features.
    """
    _refuse_path_with_two_images(ranking.query, ranking.gallery)
    images = _Images()
    queries = []
    for row in range(len(ranking.query)):
        shown = [int(image) for image in ranking.top[row] if image != NOBODY]
        first = int(ranking.first[row])
        queries.append(
            Query(
                image=images.number(ranking.query, row),
                top=[images.number(ranking.gallery, image) for image in shown],
                distances=ranking.distances[row, : len(shown)].tolist(),
                matches=int(ranking.scores.matches[row]),
                position=int(ranking.scores.image_rank[row]),
                rank=int(ranking.rank[row]),
                average_precision=float(ranking.scores.average_precision[row]),
                first=NOBODY if first == NOBODY else images.number(ranking.gallery, first),
                first_distance=float(ranking.first_distance[row]),
            )
        )
    metrics = {**ranking.metrics, **(more or {})}
    trial = f" · trial {ranking.trial} of {ranking.num_trials} is shown" if ranking.num_trials > 1 else ""
    return Page(
        title=title,
        protocol=f"{ranking.setting}{trial} · {describe_measurement(metrics)}",
        images=images.shown,
        queries=queries,
        distance="1 − cosine" if ranking.metric == "cosine" else "Euclidean distance",
        figures=_figures(ranking),
    )


def _refuse_path_with_two_images(query: Embeddings, gallery: Embeddings) -> None:
    """Photos are found by path alone, so a path may stand for one image only."""
    both, of_query, of_gallery = np.intersect1d(query.paths, gallery.paths, return_indices=True)
    if query.features.shape[1] != gallery.features.shape[1]:
        return
    for path, one, other in zip(both, of_query, of_gallery, strict=True):
        # The same image embedded in another batch differs by rounding.
        large = np.abs(query.features[one]).max(initial=0)
        if not np.allclose(query.features[one], gallery.features[other], rtol=0, atol=0.01 * large):
            raise UserError(f"path {path} is in both files with different vectors; store distinct paths")


class _Images:
    """Collects the images of a page, each once, numbered in the order in which they come."""

    def __init__(self):
        self.shown: list[ShownImage] = []
        self._numbers: dict[tuple[int, int], int] = {}

    def number(self, of: Embeddings, row: int) -> int:
        key = (id(of), row)
        if key not in self._numbers:
            self._numbers[key] = len(self.shown)
            name = str(of.pids[row]) if of.pid_names is None else str(of.pid_names[row])
            modality = UNKNOWN if of.modality is None else int(of.modality[row])
            self.shown.append(ShownImage(str(of.paths[row]), name, int(of.camids[row]), modality, int(of.pids[row])))
        return self._numbers[key]


def _figures(ranking: Ranking) -> list[tuple[str, str, str]]:
    metrics, scored = ranking.metrics, ranking.scores.matches > 0
    found = []
    for name, key in (("Rank-1", "rank1"), ("Rank-10", "rank10"), ("mAP", "mAP"), ("mINP", "mINP")):
        detail = ""
        if ranking.num_trials > 1:
            detail = f"± {metrics['std'][key]:.1f} over {ranking.num_trials} trials"
        elif key in metrics.get("interval", {}):
            detail = "{:.1f}–{:.1f}".format(*metrics["interval"][key])
        found.append((name, f"{metrics[key]:.1f} %", detail))
    wrong = int((ranking.rank[scored] != 1).sum())
    found.append(("queries", f"{scored.sum():,}", f"{len(scored) - scored.sum():,} more without a match"))
    found.append(("wrong at rank 1", f"{wrong:,}", "in this trial" if ranking.num_trials > 1 else ""))
    found.append(("gallery", f"{ranking.num_gallery:,}", "images"))
    return found
