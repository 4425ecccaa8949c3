"""From an image file's bytes to the network's uint8 pixels: decode, then the bilinear resize that Pillow does.

simplejpeg (libjpeg-turbo) decodes to Pillow's bits in about half its time, and OpenCV resizes several times faster than
Pillow; `scripts/benchmark.py data` measures both. One function serves training, caches and evaluation, so they see
the same pixels.
"""

import functools
import io

import cv2
import numpy as np
import simplejpeg
from PIL import Image

from mpanet_jax.errors import UserError

# The pipeline's threads each take an image; threads inside one image only get in their way.
cv2.setNumThreads(0)

# Threads that decode in one process. Of an image's 320 µs only some 15 need Python's lock, but in five pieces, and for
# each it has to be had from another thread: with many threads that takes longer than the decoding.
MAX_THREADS = 8

# Pillow reduces by widening the interpolation triangle, against aliasing. OpenCV doesn't; a blur with the taps
# [b₂, b₁, 1−2(b₁+b₂), b₁, b₂] before its cubic interpolation comes to nearly the same filter. The taps of each
# reduction are the least-squares fit of the one filter to the other over all positions, for pixels with 20 % noise
# and otherwise a correlation that falls off over 8 pixels. At 3 the fit is exact.
_REDUCTION = [1.08, 1.10, 1.15, 1.20, 1.30, 1.40, 1.50, 1.60, 1.70, 1.80, 1.90, 2.00, 2.20, 2.50, 3.00]
_BLUR_1 = [0.078, 0.083, 0.102, 0.118, 0.148, 0.173, 0.198, 0.211, 0.224, 0.235, 0.242, 0.241, 0.248, 0.240, 0.222]
_BLUR_2 = [0.013, 0.012, 0.008, 0.005, 0.000, -0.002, 0.001, 0.000, 0.004, 0.010, 0.017, 0.041, 0.044, 0.077, 0.111]


def decode_rgb(encoded: bytes, path: str) -> np.ndarray:
    """uint8[h, w, 3]: the RGB pixels of a JPEG, PNG or any other file that Pillow reads.

    Grey, palette, CMYK and transparent images are converted to RGB as Pillow's `convert("RGB")` does; of 16 bits the
    upper 8 are taken. Raises `UserError` naming `path` if the bytes are no image, or are cut off.
    """
    if encoded[:2] == b"\xff\xd8":
        try:
            return simplejpeg.decode_jpeg(encoded, "RGB")
        except ValueError:
            pass  # CMYK, or damaged: Pillow converts the one and says what is wrong with the other
    try:
        image = Image.open(io.BytesIO(encoded))
        if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
            # Pillow's own conversion cuts off at 255, which leaves such an image white.
            return np.repeat((np.asarray(image) >> 8).astype(np.uint8)[..., None], 3, axis=2)
        if image.mode in ("I", "F"):
            raise ValueError("pixels of 32 bits have no agreed range: save it with 8 or 16")
        return np.asarray(image.convert("RGB"))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        # Pillow's text for bytes that it doesn't know names a Python object, not what is wrong.
        reason = "not an image" if isinstance(error, Image.UnidentifiedImageError) else error
        raise UserError(
            f"image {path} can't be decoded ({reason}); replace the file, "
            "check the rest with scripts/prepare_data.py --check, and prepare the data again"
        ) from error


def resize_bilinear(image: np.ndarray, height: int, width: int, out: np.ndarray | None = None) -> np.ndarray:
    """uint8[height, width, 3]: `image` resized like Pillow's `resize((width, height), BILINEAR)`.

    Enlarging, the two agree to rounding. Reducing, the mean absolute difference stays below 1 of 255 (about 0.3 on
    photographs). Reductions by more than 3 are left to Pillow. The pixels are written to `out` if it is given: a
    contiguous uint8[height, width, 3].
    """
    reduction_y, reduction_x = image.shape[0] / height, image.shape[1] / width
    if max(reduction_y, reduction_x) > _REDUCTION[-1]:
        image = np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR))
    if image.shape[:2] == (height, width):
        if out is None:
            return image
        out[:] = image
        return out
    (taps_x, method_x), (taps_y, method_y) = _filter(reduction_x), _filter(reduction_y)
    if max(reduction_y, reduction_x) > 1:
        image = cv2.sepFilter2D(image, -1, taps_x, taps_y, borderType=cv2.BORDER_REPLICATE)
    if method_x != method_y:
        image = cv2.resize(image, (width, image.shape[0]), interpolation=method_x)
    return cv2.resize(image, (width, height), dst=out, interpolation=method_y)


def decode_and_resize(encoded: bytes, path: str, height: int, width: int, out: np.ndarray | None = None) -> np.ndarray:
    """uint8[height, width, 3]: `resize_bilinear` of `decode_rgb`, into `out` if given; raises what they raise."""
    return resize_bilinear(decode_rgb(encoded, path), height, width, out)


# Images come in few sizes, and this is half of the time for which a resize holds Python's lock.
@functools.lru_cache(maxsize=4096)
def _filter(reduction: float) -> tuple[np.ndarray, int]:
    """The blur and OpenCV's interpolation that are Pillow's bilinear filter along one axis."""
    if reduction <= 1:
        return np.array([0, 1, 0], np.float32), cv2.INTER_LINEAR  # OpenCV is faster with three taps than with one
    if reduction < _REDUCTION[0]:  # the same fit: here linear interpolation is the nearer
        side = 0.35 * (reduction - 1)
        return np.array([side, 1 - 2 * side, side], np.float32), cv2.INTER_LINEAR
    near, far = np.interp(reduction, _REDUCTION, _BLUR_1), np.interp(reduction, _REDUCTION, _BLUR_2)
    return np.array([far, near, 1 - 2 * (near + far), near, far], np.float32), cv2.INTER_CUBIC
