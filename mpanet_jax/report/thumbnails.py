"""Makes small pictures for the retrieval page: photos as JPEG, pattern maps as PNG."""

import base64
import io
import os
from collections.abc import Callable
from pathlib import Path, PurePosixPath

import numpy as np
from jaxtyping import Float32
from PIL import Image

from mpanet_jax.data.decode import BadImageError, decode_rgb, encoded_image
from mpanet_jax.datasets.schema import Split

HEIGHT, WIDTH = 128, 96  # the largest size of a photo, in pixels
QUALITY = 70
DARKEST = 40  # the grey level, from 0 to 255, of a map's smallest value

# The path of an image → the image, or None if it is missing or cannot be read.
Photos = Callable[[str], Image.Image | None]


def photos_of_folder(folder: str | os.PathLike) -> Photos:
    """Read images below a folder by their paths relative to it; a path that leads out of the folder has no image."""
    root = Path(folder)

    def photo(path: str) -> Image.Image | None:
        parts = PurePosixPath(path.replace("\\", "/"))
        if parts.is_absolute() and parts.is_relative_to(root.absolute().as_posix()):
            parts = parts.relative_to(root.absolute().as_posix())
        if parts.is_absolute() or ".." in parts.parts:
            return None
        try:
            file = root / parts
            return decode_rgb(file.read_bytes()) if file.is_file() else None
        except (BadImageError, OSError, ValueError):  # ValueError: not a possible file name
            return None

    return photo


def photos_of_split(split: Split) -> Photos:
    """Read images of a prepared split by their paths."""
    rows = {path: row for row, path in enumerate(split.paths.tolist())}

    def photo(path: str) -> Image.Image | None:
        return decode_rgb(encoded_image(split, rows[path])) if path in rows else None

    return photo


def jpeg_thumbnail(photo: Image.Image) -> bytes:
    """Encode a photo as a JPEG of at most `WIDTH` × `HEIGHT` pixels; its proportions are kept."""
    small = photo.copy()
    small.thumbnail((WIDTH, HEIGHT))
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=QUALITY, optimize=True)
    return buffer.getvalue()


def map_strip(maps: Float32[np.ndarray, "l h w"]) -> bytes:
    """Encode the l pattern maps of an image side by side as a grey PNG.

    Each map goes from dark grey at its smallest value to white at its largest. The page multiplies the photo by it, so
    the photo stays visible where a map is dark.
    """
    low, high = maps.min((1, 2), keepdims=True), maps.max((1, 2), keepdims=True)
    scaled = (maps - low) / np.where(high > low, high - low, 1)
    strip = np.concatenate(list(np.round(DARKEST + (255 - DARKEST) * scaled).astype(np.uint8)), axis=1)
    buffer = io.BytesIO()
    Image.fromarray(strip).save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def data_address(content: bytes, kind: str) -> str:
    """Encode a picture's bytes as a `data:` URL; `kind` is 'jpeg' or 'png'."""
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
