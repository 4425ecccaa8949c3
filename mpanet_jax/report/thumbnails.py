"""Small pictures for the retrieval page: photos as JPEG, pattern maps as PNG."""

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

HEIGHT, WIDTH = 128, 96  # of a photo at most, in pixels
QUALITY = 70
DARKEST = 40  # grey of a map's least value, of 255

# The image of a path of the embeddings, or None where it is not there or cannot be read.
Photos = Callable[[str], Image.Image | None]


def photos_of_folder(folder: str | os.PathLike) -> Photos:
    """Images below a folder, by their paths relative to it. A path that leads out of the folder has no image."""
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
        except (BadImageError, OSError, ValueError):  # ValueError: a name that no file can have
            return None

    return photo


def photos_of_split(split: Split) -> Photos:
    """Images of a prepared split, by their paths."""
    rows = {path: row for row, path in enumerate(split.paths.tolist())}

    def photo(path: str) -> Image.Image | None:
        return decode_rgb(encoded_image(split, rows[path])) if path in rows else None

    return photo


def jpeg_thumbnail(photo: Image.Image) -> bytes:
    """A photo as a JPEG of at most `WIDTH` × `HEIGHT` pixels, in its proportions."""
    small = photo.copy()
    small.thumbnail((WIDTH, HEIGHT))
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=QUALITY, optimize=True)
    return buffer.getvalue()


def map_strip(maps: Float32[np.ndarray, "l h w"]) -> bytes:
    """The l pattern maps of an image side by side as a grey PNG, each from dark grey at its least value to white.

    The page multiplies the photo by it, so that the photo stays visible in the dark parts.
    """
    low, high = maps.min((1, 2), keepdims=True), maps.max((1, 2), keepdims=True)
    scaled = (maps - low) / np.where(high > low, high - low, 1)
    strip = np.concatenate(list(np.round(DARKEST + (255 - DARKEST) * scaled).astype(np.uint8)), axis=1)
    buffer = io.BytesIO()
    Image.fromarray(strip).save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def data_address(content: bytes, kind: str) -> str:
    """A file as a `data:` address; `kind` is 'jpeg' or 'png'."""
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
