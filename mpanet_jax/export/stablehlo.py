"""Exports a trained network as a StableHLO file, which JAX runs without this package, for years (`jax.export`).

The file's first line is JSON that describes the network; the rest is what `jax.export.Exported.serialize` gives.
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
    """Write `model` as a StableHLO file that turns images uint8[B, H, W, 3] into embeddings float32[B, D].

    The file contains what that of `export_onnx` does, except that batch norm is left to the compiler, and it is checked
    in the same way.

    Args:
      model, path, batch, modality, normalize: as for `export_onnx`.
      platforms: the platforms that can run the file, some of PLATFORMS; this process's must be among them.

    Raises:
      UserError: the check fails.
      ArgumentError: `batch`, `modality` or `platforms` has an invalid value.
    """
    here = {"gpu": "cuda"}.get(jax.default_backend(), jax.default_backend())
    if not {here} <= set(platforms) <= set(PLATFORMS):
        raise ArgumentError(
            "platforms",
            f"= {platforms!r}: expected some of {', '.join(PLATFORMS)}, among them {here}, where the file is checked",
        )
    function, has_modality = embedding_function(model, normalize=normalize, modality=modality)
    with jax.default_matmul_precision("highest"):  # full float32 on every platform, not TF32
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
