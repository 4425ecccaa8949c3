"""The two modalities, as every array of this program numbers them."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Int32

from mpanet_jax.errors import ArgumentError

VISIBLE = 0
INFRARED = 1
UNKNOWN = -1  # of an image whose modality (or pid, or camid) nothing says
MODALITY_NAMES = {VISIBLE: "visible", INFRARED: "infrared"}

# What callers may say of images: of all of them one name or number, or one for each.
Modality = str | int | Sequence[str | int] | np.ndarray


def modality_numbers(modality: Modality | None, count: int) -> Int32[np.ndarray, " n"]:
    """int32[count]: the modality of `count` images, -1 where nothing says it (None).

    Args:
      modality: 'visible' or 'infrared', or its number, of all images; or a sequence of them, one for each.
      count: of the images.

    Raises:
      ArgumentError: another name or number, or another count.
    """
    if modality is None or isinstance(modality, str | int | np.integer):
        return np.full(count, UNKNOWN if modality is None else _number(modality, ""), np.int32)
    numbers = [_number(value, f"[{place}]") for place, value in enumerate(modality)]
    if len(numbers) != count:
        raise ArgumentError(
            "modality", f"has {len(numbers)} entries for {count} images; give one for each, or one name"
        )
    return np.array(numbers, np.int32)


def _number(value: object, place: str) -> int:
    for number, name in (*MODALITY_NAMES.items(), (UNKNOWN, None)):
        if value == number or (name is not None and value == name):
            return number
    raise ArgumentError("modality", f"{place}{' ' * bool(place)}= {value!r}: expected 'visible' or 'infrared'")
