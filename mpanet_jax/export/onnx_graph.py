"""An ONNX graph in the making: its values, and the layers into which what follows them is still folded.

JAX's images are [b, h, w, c] and ONNX's convolutions want [b, c, h, w]. A value remembers in which of the two orders it
lies, and is transposed only where somebody needs the other one. Constants are float64 until the file is written: so
batch norm is folded in float64.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

OPSET = 18  # onnxruntime has it since 1.14
IR_VERSION = 8  # the format of opset 18's time
FIRST, LAST = (0, 3, 1, 2), (0, 2, 3, 1)  # the permutations to [b, c, h, w] and back


@dataclass
class Constant:
    """An array that is known now; an axis along which it repeats may have length 1."""

    array: np.ndarray


@dataclass
class Computed:
    """A value of the graph.

    Attributes:
      name: in the graph.
      shape: as JAX sees it, but for axes along which it repeats, which may have length 1; a length may be symbolic.
      channels_first: whether it lies as [b, c, h, w].
      layer: what computes it, where that can still take in a factor or a summand.
    """

    name: str
    shape: tuple[Any, ...]
    channels_first: bool = False
    layer: "Layer | None" = None


Value = Constant | Computed


@dataclass
class Layer:
    """y = weight(x) · factor + summand; convolution and matrix product keep the factor in their weights.

    Attributes:
      kind: 'Conv', 'MatMul' or 'Affine', which has no weight.
      source, output: names of x and y.
      rank: of y.
      channels_first: whether x and y lie as [b, c, h, w].
      weight: float64, of a convolution [out, in, kh, kw], of a matrix product [in, out].
      factor, summand: float64 in JAX's order of axes, of length 1 along all axes but, for Conv and MatMul, the last.
      attributes: of the ONNX node.
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
        """Whether a factor or summand can be folded in: a scalar, or one value a channel."""
        return self.kind == "Affine" or array.size == 1 or array.size == array.shape[-1]

    def multiply(self, array: np.ndarray) -> None:
        """Replaces y by y · array."""
        self.factor, self.summand = self.factor * array, self.summand * array

    def add(self, array: np.ndarray) -> None:
        """Replaces y by y + array."""
        self.summand = self.summand + array


class Graph:
    """Nodes and initial values, in the order in which they are added."""

    def __init__(self):
        self._nodes: list[Any] = []  # of ONNX, or a Layer
        self._initializers: dict[str, Any] = {}
        self._orders: dict[tuple[str, Sequence[int]], str] = {}  # values in the other order of axes
        self._names = 0

    def new_name(self, hint: str = "value") -> str:
        """A new name."""
        self._names += 1
        return f"{hint}_{self._names}"

    def add_constant(self, array: np.ndarray) -> str:
        """The name of an initial value; equal arrays are stored once. float64 becomes float32."""
        import onnx

        array = np.asarray(array)
        array = np.array(array, np.float32 if array.dtype.kind == "f" else array.dtype, order="C")
        digest = hashlib.sha256(f"{array.dtype}{array.shape}".encode() + array.tobytes()).hexdigest()
        name = f"constant_{digest[:24]}"
        if name not in self._initializers:
            self._initializers[name] = onnx.numpy_helper.from_array(array, name)
        return name

    def add_node(self, kind: str, inputs: Sequence[str], **attributes: Any) -> str:
        """Adds a node with one output, and returns the output's name."""
        import onnx

        output = self.new_name(kind.lower())
        self._nodes.append(onnx.helper.make_node(kind, list(inputs), [output], **attributes))
        return output

    def add_layer(self, kind: str, source: str, rank: int, **fields: Any) -> Layer:
        """Adds a layer, which is written with all that is folded into it by then."""
        layer = Layer(kind, source, self.new_name(kind.lower()), rank, **fields)
        self._nodes.append(layer)
        return layer

    # ---- order of axes ----

    def as_last(self, value: Value) -> str:
        """The value's name, in JAX's order of axes."""
        if isinstance(value, Constant):
            return self.add_constant(value.array)
        return self._transposed(value.name, LAST) if value.channels_first else value.name

    def as_first(self, value: Value) -> str:
        """The name of a value of rank 4, or of a scalar constant, in the order [b, c, h, w]."""
        if isinstance(value, Constant):
            return self.add_constant(value.array.transpose(FIRST) if value.array.ndim == 4 else value.array)
        return value.name if value.channels_first else self._transposed(value.name, FIRST)

    def _transposed(self, name: str, order: Sequence[int]) -> str:
        if (name, order) not in self._orders:
            self._orders[name, order] = self.add_node("Transpose", [name], perm=order)
        return self._orders[name, order]

    # ---- the file ----

    def finish(self, output: str) -> tuple[list[Any], list[Any]]:
        """The nodes and the initial values that `output` depends on, in ONNX's classes."""

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
