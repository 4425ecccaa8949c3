"""What an exported file computes, from resized bytes to embeddings in float32, and the check of a finished file."""

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
from mpanet_jax.settings_base import replace, to_dict

CHECKED_IMAGES = 6
LARGEST_ERROR = 1e-4  # allowed in an embedding, relative to its length

Batch = int | str  # a number of images, or 'dynamic'


def embedding_function(
    model: Model, *, normalize: bool = True, modality: str | None = None
) -> tuple[Callable[..., Any], bool]:
    """Make the function that an exported file computes: what `model.embed` does, in float32 and the plain form.

    Args:
      model: the network and its variables, which become constants of the function.
      normalize: whether the function gives rows of length 1.
      modality: 'visible' or 'infrared', the modality of all images. None: a method that needs the modality takes it as
        the function's second argument.

    Returns:
      The function: images uint8[b, h, w, 3], with modality int32[b] (0 visible, 1 infrared) if it has the second
      argument, → embeddings float32[b, D]. And whether it has that second argument.
    """
    method = make_method(replace(model.settings, {"dtype": "float32", "model.fused": "off"}))
    network, has_argument = method.network(NUM_IDS), method.needs_modality and modality is None
    number, variables = modality_numbers(modality, 1)[0], jax.tree.map(jnp.asarray, model.variables)

    def function(images: Any, *argument: Any) -> Any:
        modalities = argument[0] if has_argument else jnp.full(images.shape[:1], number, jnp.int32)
        rows = method.embed(network, variables, images, modalities)
        if normalize:  # like `row_norms.l2_normalize`, in JAX
            rows /= jnp.maximum(jnp.linalg.norm(rows, axis=1, keepdims=True), np.finfo(np.float32).tiny)
        return rows

    return function, has_argument


def argument_shapes(model: Model, batch: Batch, has_modality: bool) -> list[jax.ShapeDtypeStruct]:
    """Shapes and types of the function's arguments.

    Args:
      model: its settings give the images' height and width.
      batch: the number of images, or 'dynamic' for a batch of any size.
      has_modality: whether the function takes the modality too.

    Raises:
      ArgumentError: `batch` is neither a positive number nor 'dynamic'.
    """
    if isinstance(batch, bool) or not (batch == "dynamic" or (isinstance(batch, int) and batch > 0)):
        raise ArgumentError("batch", f"= {batch!r}: expected a positive number of images, or 'dynamic'")
    rows = symbolic_shape("batch")[0] if batch == "dynamic" else batch
    images = jax.ShapeDtypeStruct((rows, model.settings.data.height, model.settings.data.width, 3), jnp.uint8)
    return [images, *([jax.ShapeDtypeStruct((rows,), jnp.int32)] if has_modality else [])]


def metadata(model: Model, *, normalize: bool, modality: str | None) -> dict[str, str]:
    """What a program that runs the file has to know, as {name: text} (docs/export.md)."""
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
    """Check that a file gives the same embeddings as `model.embed` in float32, on images of synthetic people.

    Args:
      model: the exported model.
      run: runs the file: images uint8[b, h, w, 3], and modality int32[b] with `has_modality`, → embeddings.
      batch, has_modality, modality, normalize: as the file was exported.
      name: the file's name, for the error.

    Raises:
      UserError: an embedding differs by more than LARGEST_ERROR.
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
            f"{name}: not written, since its embeddings differ from the network's by {np.max(error):.2g} of their "
            f"length, and at most {LARGEST_ERROR:g} is allowed; please report this with the network's settings"
        )
