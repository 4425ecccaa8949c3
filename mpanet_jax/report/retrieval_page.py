"""The retrieval page: one HTML file on which a person looks through rankings and finds out why a query fails."""

import base64
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np

from mpanet_jax.cpus import available_cpus
from mpanet_jax.embeddings import Embeddings
from mpanet_jax.errors import UserError
from mpanet_jax.evaluation.evaluate import describe
from mpanet_jax.files import write_whole
from mpanet_jax.modality import MODALITY_NAMES, UNKNOWN
from mpanet_jax.progress import track
from mpanet_jax.report.requirements import require_report
from mpanet_jax.report.retrieval import NOBODY, Ranking
from mpanet_jax.report.thumbnails import Photos, data_address, jpeg_thumbnail, map_strip

INLINE_LIMIT = 3 * 2**20  # bytes of pictures, as text, up to which they stand in the page itself
_OWN_FILES = re.compile(r"\d{6}(\.jpg|_maps\.png)")

# Paths of images → their pattern maps, float32[n, l, h, w].
Maps = Callable[[Sequence[str]], np.ndarray]


@dataclass(frozen=True)
class Shown:
    """An image that the page shows.

    Attributes:
      path: of its file.
      identity: what it is called; '' is unknown.
      camera, modality: -1 is unknown.
      person: the pid, by which images are right or wrong, for two people may have one name; -1 is unknown.
    """

    path: str
    identity: str = ""
    camera: int = UNKNOWN
    modality: int = UNKNOWN
    person: int = UNKNOWN


@dataclass(frozen=True)
class Query:
    """A query of the page. All images are numbers of `Page.images`.

    Attributes:
      image: the query's own.
      top, distances: the first images of its ranking.
      matches: how many right images its gallery holds; None where identities are not known.
      position, rank: of the first right image, from 1, as images count and as the CMC counts.
      average_precision: from 0 to 1.
      first, first_distance: the first right image; `NOBODY` where there is none.
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
    """What the page says.

    Attributes:
      title, protocol: its first lines.
      figures: (name, value, detail) of each, as text.
      distance: what the numbers below the images are: '1 − cosine'.
      notes: lines of warning.
    """

    title: str
    protocol: str
    images: list[Shown]
    queries: list[Query]
    distance: str
    figures: list[tuple[str, str, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def page_of_ranking(ranking: Ranking, title: str, more: Mapping[str, Any] | None = None) -> Page:
    """The page of a trial; `more` is what `describe` may say beside: 'checkpoint', 'flip', 'dataset' …

    Raises:
      UserError: a path of the queries and one of the gallery are the same, but their features are not.
    """
    _refuse_two_images_of_a_path(ranking.query, ranking.gallery)
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
        protocol=f"{ranking.setting}{trial} · {describe(metrics)}",
        images=images.shown,
        queries=queries,
        distance="1 − cosine" if ranking.metric == "cosine" else "Euclidean distance",
        figures=_figures(ranking),
    )


def _refuse_two_images_of_a_path(query: Embeddings, gallery: Embeddings) -> None:
    """Photos are found by their paths alone."""
    both, of_query, of_gallery = np.intersect1d(query.paths, gallery.paths, return_indices=True)
    if query.features.shape[1] != gallery.features.shape[1]:
        return
    for path, one, other in zip(both, of_query, of_gallery, strict=True):
        # The same image, embedded in another batch, differs by rounding.
        large = np.abs(query.features[one]).max(initial=0)
        if not np.allclose(query.features[one], gallery.features[other], rtol=0, atol=0.01 * large):
            raise UserError(f"path {path} is in both files with different vectors; store distinct paths")


class _Images:
    """The images of a page, each once, numbered as they come."""

    def __init__(self):
        self.shown: list[Shown] = []
        self._numbers: dict[tuple[int, int], int] = {}

    def number(self, of: Embeddings, row: int) -> int:
        key = (id(of), row)
        if key not in self._numbers:
            self._numbers[key] = len(self.shown)
            name = str(of.pids[row]) if of.pid_names is None else str(of.pid_names[row])
            modality = UNKNOWN if of.modality is None else int(of.modality[row])
            self.shown.append(Shown(str(of.paths[row]), name, int(of.camids[row]), modality, int(of.pids[row])))
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


@dataclass(frozen=True)
class Written:
    """What `write_page` wrote: how many images are shown, and the paths of those that lack their photo."""

    num_images: int
    missing: list[str]


def write_page(path: str | os.PathLike, page: Page, photos: Photos, maps: Maps | None = None) -> Written:
    """Write the page; it and its folder of images appear whole or not at all.

    Args:
      path: the HTML file. Where the pictures are more than `INLINE_LIMIT` they go to a folder beside it, report_images
        for report.html, from which the page loads those that come into view.
      page: what it says.
      photos: the images by their paths; those that lack are counted and shown as a placeholder.
      maps: their pattern maps, where there are any.

    Raises:
      UserError: jinja2 is not installed.
    """
    require_report("jinja2")
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup

    path = Path(path)
    paths = [image.path for image in page.images]
    pictures = _jpegs(paths, photos)
    missing = [name for name in paths if name not in pictures]
    strips, num_patterns = _strips([name for name in paths if name in pictures], maps)
    inline = 4 / 3 * (sum(map(len, pictures.values())) + sum(map(len, strips.values()))) <= INLINE_LIMIT
    folder = None if inline else f"{path.stem}_images"
    data = _data(page, pictures, strips, num_patterns, folder)
    texts = {kind: files("mpanet_jax.report").joinpath(f"retrieval_page.{kind}").read_text("utf-8") for kind in _KINDS}
    notes = list(page.notes)
    if missing:
        notes.append(f"{len(missing):,} of {len(paths):,} images are not there or not readable, first {missing[0]}")
    environment = Environment(autoescape=True, undefined=StrictUndefined)
    html = environment.from_string(texts["html"]).render(
        page=page,
        notes=notes,
        policy=_policy(texts["css"], texts["js"]),
        style=Markup(texts["css"]),
        script=Markup(texts["js"]),
        data=Markup(_json(data)),
    )
    content = html.encode("utf-8", "backslashreplace")  # a name of a file may be no UTF-8
    if folder is not None:
        _write_folder(path.parent / folder, paths, pictures, strips)
    with write_whole(path, "wb") as file:
        file.write(content)
    return Written(len(paths), missing)


_KINDS = ("html", "css", "js")


def _policy(style: str, script: str) -> str:
    """A Content-Security-Policy: no network, this very style and script, and images from the page and its folder."""

    def source(text: str) -> str:
        return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"

    return (
        f"default-src 'none'; img-src data: 'self' file:; style-src {source(style)}; script-src {source(script)}; "
        "base-uri 'none'; form-action 'none'"
    )


def _json(value: Any) -> str:
    """Compact JSON that may stand in a script element: no '<', '>' or '&' in it."""
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def _data(
    page: Page, pictures: Mapping[str, bytes], strips: Mapping[str, bytes], num_patterns: int, folder: str | None
) -> dict[str, Any]:
    """What the page's script reads; columns, for compactness."""
    identities = sorted({image.identity for image in page.images} - {""}, key=_natural)
    numbers = {name: number for number, name in enumerate(identities)}
    inline = folder is None
    images = {
        "path": [image.path for image in page.images],
        "identity": [numbers.get(image.identity, -1) for image in page.images],
        "person": [image.person for image in page.images],
        "camera": [image.camera for image in page.images],
        "modality": [image.modality for image in page.images],
        "missing": [int(image.path not in pictures) for image in page.images],
    }
    if inline:
        images["photo"] = [data_address(pictures[i.path], "jpeg") if i.path in pictures else None for i in page.images]
        images["maps"] = [data_address(strips[i.path], "png") if i.path in strips else None for i in page.images]
    queries = page.queries
    return {
        "folder": folder,
        "distance": page.distance,
        "patterns": num_patterns,
        "scored": any(query.matches is not None for query in queries),
        "modalities": {str(number): name for number, name in MODALITY_NAMES.items()},
        "identities": identities,
        "images": images,
        "queries": {
            "image": [query.image for query in queries],
            "top": [list(query.top) for query in queries],
            "distances": [[_rounded(d) for d in query.distances] for query in queries],
            "matches": [query.matches or 0 for query in queries],
            "position": [query.position for query in queries],
            "rank": [query.rank for query in queries],
            "ap": [round(query.average_precision, 6) for query in queries],
            "first": [query.first for query in queries],
            "first_distance": [_rounded(query.first_distance) for query in queries],
        },
    }


def _rounded(distance: float) -> float | None:
    return float(f"{distance:.4g}") if np.isfinite(distance) else None


def _natural(name: str) -> list[Any]:
    """Sorts '9' before '10', and numbers before words."""
    # Python refuses to read numbers of thousands of digits: up to 18 of them are one number.
    return [(0, int(part), "") if part.isdecimal() else (1, 0, part) for part in re.split(r"(\d{1,18})", name) if part]


# ---- pictures ----


def _jpegs(paths: Sequence[str], photos: Photos) -> dict[str, bytes]:
    """{path: JPEG} of those that can be read."""

    def jpeg(path: str) -> bytes | None:
        photo = photos(path)
        return None if photo is None else jpeg_thumbnail(photo)

    unique = list(dict.fromkeys(paths))
    with ThreadPoolExecutor(min(8, available_cpus())) as pool:
        made = track(pool.map(jpeg, unique), "page: photos", len(unique))
        return {path: content for path, content in zip(unique, made, strict=True) if content is not None}


def _strips(paths: Sequence[str], maps: Maps | None) -> tuple[dict[str, bytes], int]:
    """{path: PNG of its pattern maps}, and how many patterns there are."""
    unique = list(dict.fromkeys(paths))
    if maps is None or not unique:
        return {}, 0
    found = maps(unique)
    return {path: map_strip(one) for path, one in zip(unique, found, strict=True)}, found.shape[1]


def _write_folder(
    folder: Path, paths: Sequence[str], pictures: Mapping[str, bytes], strips: Mapping[str, bytes]
) -> None:
    """Write NNNNNN.jpg and NNNNNN_maps.png of each image into a new folder, which then takes the old one's place."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    new = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        for number, path in enumerate(paths):
            if path in pictures:
                (new / f"{number:06}.jpg").write_bytes(pictures[path])
            if path in strips:
                (new / f"{number:06}_maps.png").write_bytes(strips[path])
        new.chmod(0o755)  # mkdtemp makes it private
        if folder.exists():
            others = [name for name in os.listdir(folder) if not _OWN_FILES.fullmatch(name)]
            if others:
                raise UserError(f"{folder}: holds {others[0]}, which is none of the page's images; name another page")
            shutil.rmtree(folder)
        os.replace(new, folder)
    except BaseException:
        shutil.rmtree(new, ignore_errors=True)
        raise
