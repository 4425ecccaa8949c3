"""The retrieval page: an HTML file for looking through rankings and finding out why a query fails."""

import base64
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np

from mpanet_jax.cpus import available_cpus
from mpanet_jax.errors import UserError
from mpanet_jax.files import write_whole
from mpanet_jax.modality import MODALITY_NAMES
from mpanet_jax.progress import track
from mpanet_jax.report.page_content import Page
from mpanet_jax.report.requirements import require_report
from mpanet_jax.report.thumbnails import Photos, data_address, jpeg_thumbnail, map_strip

INLINE_LIMIT = 3 * 2**20  # bytes in base64: up to here the pictures are part of the page itself
_OWN_FILES = re.compile(r"\d{6}(\.jpg|_maps\.png)")

# Paths of n images → their l pattern maps, float32[n, l, h, w].
Maps = Callable[[Sequence[str]], np.ndarray]


@dataclass(frozen=True)
class Written:
    """What `write_page` wrote: the number of images on the page, and the paths of those whose photo is missing."""

    num_images: int
    missing: list[str]


def write_page(path: str | os.PathLike, page: Page, photos: Photos, maps: Maps | None = None) -> Written:
    """Write the page; the file and its folder of images each appear whole or not at all.

    Args:
      path: the HTML file. Pictures of more than `INLINE_LIMIT` bytes go to a folder beside it, report_images for
        report.html; the page then loads each picture when it comes into view.
      page: what it shows.
      photos: gives the photo of a path; a missing photo is shown as a placeholder and counted in a note.
      maps: gives the pattern maps of paths; None: the page shows none.

    Raises:
      UserError: jinja2 is not installed, or the folder holds files that are not the page's.
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
    content = html.encode("utf-8", "backslashreplace")  # file names need not be UTF-8
    if folder is not None:
        _write_folder(path.parent / folder, paths, pictures, strips)
    with write_whole(path, "wb") as file:
        file.write(content)
    return Written(len(paths), missing)


_KINDS = ("html", "css", "js")


def _policy(style: str, script: str) -> str:
    """A Content-Security-Policy: no network, no style or script but these, images from the page and its folder."""

    def source(text: str) -> str:
        return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"

    return (
        f"default-src 'none'; img-src data: 'self' file:; style-src {source(style)}; script-src {source(script)}; "
        "base-uri 'none'; form-action 'none'"
    )


def _json(value: Any) -> str:
    """Compact JSON without '<', '>' and '&', which is safe inside a script element."""
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def _data(
    page: Page, pictures: Mapping[str, bytes], strips: Mapping[str, bytes], num_patterns: int, folder: str | None
) -> dict[str, Any]:
    """What the page's script reads, stored by columns to save room."""
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
    """A sort key that puts '9' before '10', and numbers before words."""
    # Python refuses to read numbers of thousands of digits: up to 18 of them are one number.
    return [(0, int(part), "") if part.isdecimal() else (1, 0, part) for part in re.split(r"(\d{1,18})", name) if part]


# ---- pictures ----


def _jpegs(paths: Sequence[str], photos: Photos) -> dict[str, bytes]:
    """{path: JPEG} of the photos that can be read."""

    def jpeg(path: str) -> bytes | None:
        photo = photos(path)
        return None if photo is None else jpeg_thumbnail(photo)

    unique = list(dict.fromkeys(paths))
    with ThreadPoolExecutor(min(8, available_cpus())) as pool:
        made = track(pool.map(jpeg, unique), "page: photos", len(unique))
        return {path: content for path, content in zip(unique, made, strict=True) if content is not None}


def _strips(paths: Sequence[str], maps: Maps | None) -> tuple[dict[str, bytes], int]:
    """{path: PNG of its pattern maps}, and the number of patterns."""
    unique = list(dict.fromkeys(paths))
    if maps is None or not unique:
        return {}, 0
    found = maps(unique)
    return {path: map_strip(one) for path, one in zip(unique, found, strict=True)}, found.shape[1]


def _write_folder(
    folder: Path, paths: Sequence[str], pictures: Mapping[str, bytes], strips: Mapping[str, bytes]
) -> None:
    """Write NNNNNN.jpg and NNNNNN_maps.png of each image into a new folder, then put it in place of the old one."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    new = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        for number, path in enumerate(paths):
            if path in pictures:
                (new / f"{number:06}.jpg").write_bytes(pictures[path])
            if path in strips:
                (new / f"{number:06}_maps.png").write_bytes(strips[path])
        new.chmod(0o755)  # mkdtemp makes a private folder
        if folder.exists():
            others = [name for name in os.listdir(folder) if not _OWN_FILES.fullmatch(name)]
            if others:
                raise UserError(f"{folder}: holds {others[0]}, which is no image of the page; name another page")
            shutil.rmtree(folder)
        os.replace(new, folder)
    except BaseException:
        shutil.rmtree(new, ignore_errors=True)
        raise
