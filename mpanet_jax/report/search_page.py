"""Makes the retrieval page of a search from its results.json; identities are unknown, so no match is right or wrong."""

import json
import math
import os
from pathlib import Path
from typing import Any

from PIL import Image

from mpanet_jax.data.decode import BadImageError, decode_rgb, read_image_file
from mpanet_jax.errors import UserError
from mpanet_jax.evaluation.search import RESULTS_FORMAT
from mpanet_jax.modality import MODALITY_NAMES, UNKNOWN
from mpanet_jax.report.page_content import Page, Query, ShownImage
from mpanet_jax.report.thumbnails import Photos, photos_of_folder


def page_of_search(path: str | os.PathLike, images: str | os.PathLike | None = None) -> tuple[Page, Photos]:
    """Read a results.json (docs/search.md) and make its page.

    Args:
      path: the results.json.
      images: the folder that the gallery is in now; only images in it are shown. None: the folder that the file names,
        and images outside of it where the file names them. Queries are always read from the paths in the file.

    Returns:
      The page, and the photos of its images.

    Raises:
      UserError: there is no such file, or it is damaged or not the results of a search.
    """
    tree = _read(Path(path))
    try:
        return _page(tree, Path(images or tree["folder"]), elsewhere=images is not None)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{path}: damaged ({type(error).__name__}: {error}); search again") from error


def _read(path: Path) -> dict[str, Any]:
    expected = "expected the JSON file that scripts/search.py --out writes"
    try:
        tree = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; {expected}") from None
    except (ValueError, OSError) as error:
        raise UserError(f"{path}: not readable as JSON; {expected}") from error
    if not isinstance(tree, dict) or {name: tree.get(name) for name in RESULTS_FORMAT} != RESULTS_FORMAT:
        raise UserError(f"{path}: not results of a search, version {RESULTS_FORMAT['version']}; {expected}")
    return tree


def _page(tree: dict[str, Any], folder: Path, *, elsewhere: bool) -> tuple[Page, Photos]:
    modality = {name: number for number, name in MODALITY_NAMES.items()}
    shown: list[ShownImage] = []
    numbers: dict[tuple[str, bool], int] = {}

    def number(image: str, is_query: bool, word: str) -> int:
        if (image, is_query) not in numbers:
            numbers[image, is_query] = len(shown)
            shown.append(ShownImage(str(image), modality=modality.get(word, UNKNOWN)))
        return numbers[image, is_query]

    queries = []
    for ranking in tree["queries"]:
        distances = [float(match["distance"]) for match in ranking["matches"]]
        if not all(map(math.isfinite, distances)):
            raise ValueError("a distance is not finite")
        top = [number(match["path"], False, match.get("modality", "")) for match in ranking["matches"]]
        queries.append(Query(number(ranking["path"], True, ""), top, distances))
    # Queries are where the file says, and so are images that the gallery's list names outside its folder.
    asked = {image for image, is_query in numbers if is_query}
    readable = {image for image, is_query in numbers if is_query or not elsewhere}
    gallery = photos_of_folder(folder)

    def photo(image: str) -> Image.Image | None:
        found = gallery(image)
        if found is not None or image not in readable:
            return found
        try:
            return decode_rgb(read_image_file(image if image in asked else folder / image))
        except BadImageError:
            return None

    skipped = [f"{len(tree['skipped'])} queries could not be read"] if tree.get("skipped") else []
    protocol = f"gallery {tree['gallery']}, {int(tree['num_gallery']):,} images · model {tree['model']}"
    return Page("Search", protocol, shown, queries, "1 − cosine", notes=skipped), photo
