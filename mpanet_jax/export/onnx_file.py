"""Exports a trained network as an ONNX file, which ONNX Runtime and many other programs run without JAX or Python."""

import os
from typing import Any

import numpy as np

from mpanet_jax.errors import UserError
from mpanet_jax.export.equations import equations_of
from mpanet_jax.export.function import Batch, argument_shapes, check_file, embedding_function, metadata
from mpanet_jax.export.onnx_graph import IR_VERSION, OPSET, Computed, Graph
from mpanet_jax.export.onnx_primitives import write_equations
from mpanet_jax.files import write_whole
from mpanet_jax.model import Model

INPUTS, OUTPUT = ("images", "modality"), "embeddings"
_TWO_GIB = 2**31  # protocol buffers, and so ONNX files, are smaller


def export_onnx(
    model: Model,
    path: str | os.PathLike,
    *,
    batch: Batch = "dynamic",
    modality: str | None = None,
    normalize: bool = True,
) -> None:
    """Write `model` as an ONNX file that turns images uint8[B, H, W, 3] into embeddings float32[B, D].

    The file contains the pixels' normalisation, the neck, the flip (`settings.eval.flip`) and the L2 normalisation;
    batch norm is folded into the convolutions. Before the file is put in place, ONNX Runtime runs it on images of
    synthetic people; it must agree with `model.embed` to a relative error of 1e-4.

    Args:
      model: what `mpanet_jax.load` gives.
      path: the file to write.
      batch: the number of images B, or 'dynamic' for any number.
      modality: 'visible' or 'infrared', for a file that takes images of this modality only. None: for AGW and CAJ the
        file has a second input, `modality int32[B]` (0 visible, 1 infrared); MPANet needs none.
      normalize: whether embeddings have length 1, as `Model.embed` gives them by default.

    Raises:
      UserError: onnx or onnxruntime is not installed, the network uses an operation that this export lacks, the file
        would reach 2 GiB, or the check fails.
      ArgumentError: `batch` or `modality` has an invalid value.
    """
    require_onnx()
    import onnxruntime

    function, has_modality = embedding_function(model, normalize=normalize, modality=modality)
    entries = metadata(model, normalize=normalize, modality=modality)
    encoded = onnx_bytes(function, argument_shapes(model, batch, has_modality), model.size, entries)
    session = onnxruntime.InferenceSession(encoded, providers=["CPUExecutionProvider"])

    def run(*arguments: np.ndarray) -> np.ndarray:
        return np.asarray(session.run([OUTPUT], dict(zip(INPUTS, arguments, strict=False)))[0])

    check_file(
        model,
        run,
        batch=batch,
        has_modality=has_modality,
        modality=modality,
        normalize=normalize,
        name=os.fspath(path),
    )
    with write_whole(path, "wb") as file:
        file.write(encoded)


def require_onnx() -> None:
    """Check that onnx and onnxruntime are installed.

    Raises:
      UserError: one is not.
    """
    try:
        import onnx
        import onnxruntime
    except ImportError as error:
        raise UserError(f"ONNX needs {error.name}: pip install onnx onnxruntime, or write .stablehlo") from error
    assert onnx and onnxruntime


def onnx_bytes(function: Any, arguments: list[Any], dimension: int, entries: dict[str, str]) -> bytes:
    """Encode a function of images, and perhaps of their modality, as an ONNX file, and check that it is well formed.

    Args:
      function: what `embedding_function` gives.
      arguments: shapes and types of its arguments (`argument_shapes`).
      dimension: D, the length of an embedding.
      entries: {name: text} for the file's metadata, stored under 'mpanet_jax.' + name.

    Raises:
      UserError: the function uses an operation that this export lacks, or the file would reach 2 GiB.
    """
    import onnx
    from onnx import helper

    equations, graph = equations_of(function, *arguments), Graph()
    names = INPUTS[: len(arguments)]
    inputs = [Computed(name, tuple(argument.shape)) for name, argument in zip(names, arguments, strict=True)]
    result = write_equations(graph, equations, dict(zip(equations.inputs, inputs, strict=True)))
    name = graph.as_last(result)
    nodes, initial = graph.finish(name)
    nodes.append(helper.make_node("Identity", [name], [OUTPUT]))

    def described(name: str, shape: tuple[Any, ...], dtype: Any) -> Any:
        sizes = [n if isinstance(n, int) else str(n) for n in shape]
        return helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(np.dtype(dtype)), sizes)

    written = helper.make_graph(
        nodes,
        "mpanet_jax",
        [described(name, a.shape, a.dtype) for name, a in zip(names, arguments, strict=True)],
        [described(OUTPUT, (arguments[0].shape[0], dimension), np.float32)],
        initial,
    )
    opset = helper.make_opsetid("", OPSET)
    file = helper.make_model(written, opset_imports=[opset], ir_version=IR_VERSION, producer_name="mpanet_jax")
    helper.set_model_props(file, {f"mpanet_jax.{name}": value for name, value in entries.items()})
    if file.ByteSize() >= _TWO_GIB:
        raise UserError("an ONNX file holds at most 2 GiB, and this network is larger; write a .stablehlo file")
    onnx.checker.check_model(file, full_check=True)
    return file.SerializeToString()
