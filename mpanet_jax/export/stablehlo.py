"""A trained network as a StableHLO file, which JAX runs without this package, and which keeps for years (jax.export).

The file's first line is JSON about the network, the rest what `jax.export.Exported.serialize` gives.
"""

import json
import os

import jax
import numpy as np
from jax import export

from mpanet_jax.errors import ArgumentError
from mpanet_jax.export.function import Batch, argument_shapes, check_file, embedding_function, metadata
from mpanet_jax.files import write_whole
from mpanet_jax.model import Model

PLATFORMS = ("cpu", "cuda", "tpu")


def export_stablehlo(
    model: Model,
    path: str | os.PathLike,
    *,
    batch: Batch = "dynamic",
    modality: str | None = None,
    normalize: bool = True,
    platforms: tuple[str, ...] = PLATFORMS,
) -> None:
    """Write `model` as StableHLO: images uint8[B, H, W, 3] to embeddings float32[B, D], for several platforms.

    What is inside, the arguments and the check are those of `export_onnx`; batch norm is left to the compiler.

    Args:
      platforms: some of PLATFORMS, that of this process among them.

    Raises:
      UserError: the check fails.
      ArgumentError: `batch`, `modality` or `platforms` cannot be so.
    """
    here = {"gpu": "cuda"}.get(jax.default_backend(), jax.default_backend())
    if not {here} <= set(platforms) <= set(PLATFORMS):
        raise ArgumentError(
            "platforms",
            f"= {platforms!r}: expected some of {', '.join(PLATFORMS)}, among them {here}, where the file is checked",
        )
    function, has_modality = embedding_function(model, normalize=normalize, modality=modality)
    with jax.default_matmul_precision("highest"):  # as float32 elsewhere, not as TF32
        exported = export.export(jax.jit(function), platforms=platforms)(*argument_shapes(model, batch, has_modality))
    encoded = exported.serialize()
    call = jax.jit(export.deserialize(bytearray(encoded)).call)
    check_file(
        model,
        lambda *arguments: np.asarray(call(*arguments)),
        batch=batch,
        has_modality=has_modality,
        modality=modality,
        normalize=normalize,
        name=os.fspath(path),
    )
    header = json.dumps({**metadata(model, normalize=normalize, modality=modality), "platforms": platforms})
    with write_whole(path, "wb") as file:
        file.write(header.encode() + b"\n" + encoded)
