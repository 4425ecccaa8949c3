"""An ONNX graph under construction: its values, and layers that later factors and summands are folded into.

JAX's images are [b, h, w, c], and ONNX's convolutions take [b, c, h, w]. Each value remembers its order, and is
transposed only where the other one is needed. Constants stay in float64 until the file is written, so batch norm is
folded in float64.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

OPSET = 18  # onnxruntime has it since 1.14
IR_VERSION = 8  # the file format that came with opset 18
FIRST, LAST = (0, 3, 1, 2), (0, 2, 3, 1)  # the permutations to [b, c, h, w] and back


@dataclass
class Constant:
    """An array that is known at export; an axis along which its values repeat may have length 1."""

    array: np.ndarray


@dataclass
class Computed:
    """A value that the graph computes.

    Attributes:
      name: its name in the graph.
      shape: its shape in JAX; a length may be symbolic, and an axis along which values repeat may have length 1.
      channels_first: whether it is stored as [b, c, h, w].
      layer: the layer that computes it, if a factor or summand can still be folded into that.
    """

    name: str
    shape: tuple[Any, ...]
    channels_first: bool = False
    layer: "Layer | None" = None


Value = Constant | Computed


@dataclass
class Layer:
    """y = weight(x) · factor + summand; in the file, the weights of Conv and MatMul contain the factor.

    Attributes:
      kind: 'Conv', 'MatMul', or 'Affine', which has no weight.
      source, output: the names of x and y.
      rank: the number of axes of y.
      channels_first: whether x and y are stored as [b, c, h, w].
      weight: float64[out, in, kh, kw] of a convolution, float64[in, out] of a matrix product.
      factor, summand: float64, with JAX's order of axes. For Conv and MatMul all axes but the last have length 1.
      attributes: the attributes of the ONNX node.
    """

    kind: str
    source: str
    output: str
    rank: int
    channels_first: bool = False
    weight: np.ndarray | None = None
    factor: Any = 1.0
    summand: Any = 0.0
    attributes: dict[str, Any] = field(default_factory=dict)

    def can_take(self, array: np.ndarray) -> bool:
        """Whether `array` can be folded in as a factor or summand: Conv and MatMul take one value, or one a channel."""
        return self.kind == "Affine" or array.size == 1 or array.size == array.shape[-1]

    def multiply(self, array: np.ndarray) -> None:
        """Replace y by y · array."""
        self.factor, self.summand = self.factor * array, self.summand * array

    def add(self, array: np.ndarray) -> None:
        """Replace y by y + array."""
        self.summand = self.summand + array


class Graph:
    """Nodes and constants of an ONNX graph, in the order in which they are added."""

    def __init__(self):
        self._nodes: list[Any] = []  # ONNX nodes and Layers
        self._initializers: dict[str, Any] = {}
        self._orders: dict[tuple[str, Sequence[int]], str] = {}  # values in the other order of axes
        self._names = 0

    def new_name(self, hint: str = "value") -> str:
        """A name that no other value of the graph has."""
        self._names += 1
        return f"{hint}_{self._names}"

    def add_constant(self, array: np.ndarray) -> str:
        """Add an array, with floats as float32, and return its name; equal arrays are stored once."""
        import onnx

        array = np.asarray(array)
        array = np.array(array, np.float32 if array.dtype.kind == "f" else array.dtype, order="C")
        digest = hashlib.sha256(f"{array.dtype}{array.shape}".encode() + array.tobytes()).hexdigest()
        name = f"constant_{digest[:24]}"
        if name not in self._initializers:
            self._initializers[name] = onnx.numpy_helper.from_array(array, name)
        return name

    def add_node(self, kind: str, inputs: Sequence[str], **attributes: Any) -> str:
        """Add an ONNX node with one output, and return the output's name."""
        import onnx

        output = self.new_name(kind.lower())
        self._nodes.append(onnx.helper.make_node(kind, list(inputs), [output], **attributes))
        return output

    def add_layer(self, kind: str, source: str, rank: int, **fields: Any) -> Layer:
        """Add a layer; `finish` writes it with everything that was folded into it until then."""
        layer = Layer(kind, source, self.new_name(kind.lower()), rank, **fields)
        self._nodes.append(layer)
        return layer

    # ---- order of axes ----

    def as_last(self, value: Value) -> str:
        """The name of the value in JAX's order of axes; adds a Transpose if need be."""
        if isinstance(value, Constant):
            return self.add_constant(value.array)
        return self._transposed(value.name, LAST) if value.channels_first else value.name

    def as_first(self, value: Value) -> str:
        """The name of a value of rank 4, or of a scalar constant, as [b, c, h, w]; adds a Transpose if need be."""
        if isinstance(value, Constant):
            return self.add_constant(value.array.transpose(FIRST) if value.array.ndim == 4 else value.array)
        return value.name if value.channels_first else self._transposed(value.name, FIRST)

    def _transposed(self, name: str, order: Sequence[int]) -> str:
        if (name, order) not in self._orders:
            self._orders[name, order] = self.add_node("Transpose", [name], perm=order)
        return self._orders[name, order]

    # ---- the file ----

    def finish(self, output: str) -> tuple[list[Any], list[Any]]:
        """The ONNX nodes and constants that the value named `output` depends on."""
        layers, self._nodes, nodes = self._nodes, [], []
        for entry in layers:
            if isinstance(entry, Layer):
                self._write(entry)
                self._nodes[-1].output[0] = entry.output
            else:
                self._nodes.append(entry)
            nodes += self._nodes
            self._nodes = []
        read, kept = {output}, []
        for node in reversed(nodes):
            if node.output[0] in read:
                kept.append(node)
                read.update(node.input)
        return kept[::-1], [array for name, array in self._initializers.items() if name in read]

    def _write(self, layer: Layer) -> None:
        if layer.weight is None:
            name, order = layer.source, FIRST if layer.channels_first else range(layer.rank)
            for kind, part, neutral in (("Mul", layer.factor, 1), ("Add", layer.summand, 0)):
                array = np.asarray(part, np.float64)
                if (array != neutral).any():
                    array = array.transpose(order) if array.ndim == layer.rank else array
                    name = self.add_node(kind, [name, self.add_constant(array)])
            if name == layer.source:
                self.add_node("Identity", [name])
            return
        channels = layer.weight.shape[0 if layer.kind == "Conv" else -1]
        factor, summand = (np.broadcast_to(np.ravel(part), channels) for part in (layer.factor, layer.summand))
        if layer.kind == "Conv":
            inputs = [layer.source, self.add_constant(layer.weight * factor[:, None, None, None])]
            self.add_node("Conv", inputs + ([self.add_constant(summand)] if summand.any() else []), **layer.attributes)
        else:
            product = self.add_node("MatMul", [layer.source, self.add_constant(layer.weight * factor)])
            if summand.any():
                self.add_node("Add", [product, self.add_constant(summand)])
