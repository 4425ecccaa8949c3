"""What an exported file computes: from resized bytes to embeddings, in float32; and pictures to check a file with."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.export import symbolic_shape

from mpanet_jax.datasets.synthetic_images import draw_image
from mpanet_jax.errors import ArgumentError, UserError
from mpanet_jax.methods import make_method
from mpanet_jax.modality import MODALITY_NAMES, modality_numbers
from mpanet_jax.model import NUM_IDS, Model
from mpanet_jax.settings import replace, to_dict

CHECKED_IMAGES = 6
LARGEST_ERROR = 1e-4  # of an embedding, relative to its length

Batch = int | str  # a number of images, or 'dynamic'


def embedding_function(
    model: Model, *, normalize: bool = True, modality: str | None = None
) -> tuple[Callable[..., Any], bool]:
    """The function of `images uint8[b, h, w, 3]` that `model.embed` applies, in float32, in the plain form.

    Args:
      model: the network and its variables, which become constants of the function.
      normalize: give rows of length 1.
      modality: 'visible' or 'infrared' of all images. None leaves it to the caller where the method needs it: the
        function's second argument is then `modality int32[b]`, 0 visible and 1 infrared.

    Returns:
      The function, and whether it has that second argument.
    """
    method = make_method(replace(model.settings, {"dtype": "float32", "model.fused": "off"}))
    network, has_argument = method.network(NUM_IDS), method.needs_modality and modality is None
    number, variables = modality_numbers(modality, 1)[0], jax.tree.map(jnp.asarray, model.variables)

    def function(images: Any, *argument: Any) -> Any:
        modalities = argument[0] if has_argument else jnp.full(images.shape[:1], number, jnp.int32)
        rows = method.embed(network, variables, images, modalities)
        if normalize:  # as `Model.embed` does
            rows /= jnp.maximum(jnp.linalg.norm(rows, axis=1, keepdims=True), np.finfo(np.float32).tiny)
        return rows

    return function, has_argument


def argument_shapes(model: Model, batch: Batch, has_modality: bool) -> list[jax.ShapeDtypeStruct]:
    """Shapes and types of the function's arguments, of a batch of unknown size with 'dynamic'.

    Raises:
      ArgumentError: `batch` is neither a positive number nor 'dynamic'.
    """
    if isinstance(batch, bool) or not (batch == "dynamic" or (isinstance(batch, int) and batch > 0)):
        raise ArgumentError("batch", f"= {batch!r}: expected a positive number of images, or 'dynamic'")
    rows = symbolic_shape("batch")[0] if batch == "dynamic" else batch
    images = jax.ShapeDtypeStruct((rows, model.settings.data.height, model.settings.data.width, 3), jnp.uint8)
    return [images, *([jax.ShapeDtypeStruct((rows,), jnp.int32)] if has_modality else [])]


def metadata(model: Model, *, normalize: bool, modality: str | None) -> dict[str, str]:
    """What whoever runs the file has to know, as text by name."""
    data = model.settings.data
    return {
        "source": model.source,
        "fingerprint": model.fingerprint,
        "method": to_dict(model.settings)["method"],
        "height": str(data.height),
        "width": str(data.width),
        "resize": data.resize,
        "channels": "RGB",
        "modality": modality or "",
        "normalized": str(normalize).lower(),
        "dimension": str(model.size),
    }


def check_file(
    model: Model,
    run: Callable[..., np.ndarray],
    *,
    batch: Batch,
    has_modality: bool,
    modality: str | None,
    normalize: bool,
    name: str,
) -> None:
    """Compares what a file gives for drawn people of both modalities with `model.embed` in float32.

    Args:
      run: the file: images uint8[b, h, w, 3] (, modality int32[b]) → embeddings.
      name: of the file, for the error.

    Raises:
      UserError: they differ by more than LARGEST_ERROR.
    """
    data = model.settings.data
    numbers = np.arange(CHECKED_IMAGES, dtype=np.int32) % 2
    if modality is not None:
        numbers = modality_numbers(modality, CHECKED_IMAGES)
    images = np.stack(
        [
            np.asarray(
                draw_image(0, place, camid=1, scene=1, modality=int(number), number=0, size=(data.width, data.height))
            )
            for place, number in enumerate(numbers)
        ]
    )
    exact = Model(replace(model.settings, {"dtype": "float32"}), model.variables, model.source)
    with jax.default_matmul_precision("highest"):
        expected = exact.embed(
            list(images),
            modality=[MODALITY_NAMES[int(n)] for n in numbers],
            normalize=normalize,
            batch_size=len(images),
        )
    rows = CHECKED_IMAGES if batch == "dynamic" else int(batch)
    found = []
    for start in range(0, CHECKED_IMAGES, rows):
        places = np.arange(start, start + rows) % CHECKED_IMAGES
        found.append(run(images[places], *([numbers[places]] if has_modality else [])))
    found = np.concatenate(found)[:CHECKED_IMAGES]
    error = np.linalg.norm(found - expected, axis=1) / np.maximum(np.linalg.norm(expected, axis=1), 1e-30)
    if not (error <= LARGEST_ERROR).all():
        raise UserError(
            f"{name}: is not written: its embeddings differ from the network's by {np.max(error):.2g}, at most "
            f"{LARGEST_ERROR:g} is allowed; please report it, with the settings of the network"
        )
