"""The two modalities, and their numbers in all arrays of this program."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Int32

from mpanet_jax.errors import ArgumentError

VISIBLE = 0
INFRARED = 1
UNKNOWN = -1  # also for an unknown pid or camid
MODALITY_NAMES = {VISIBLE: "visible", INFRARED: "infrared"}

# How callers give the modality of images: one name or number for all images, or one for each.
Modality = str | int | Sequence[str | int] | np.ndarray


def modality_numbers(modality: Modality | None, count: int) -> Int32[np.ndarray, " n"]:
    """The modality of images as numbers.

    Args:
      modality: 'visible' or 'infrared', or its number, for all images; or a sequence with one for each. None: unknown.
      count: how many images there are.

    Returns:
      int32[count]: 0 visible, 1 infrared, -1 unknown.

    Raises:
      ArgumentError: another name or number, or a sequence of another length.
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
    raise ArgumentError(f"modality{place}", f"= {value!r}: expected 'visible' or 'infrared'")
