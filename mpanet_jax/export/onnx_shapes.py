"""Translates JAX's primitives into ONNX nodes: reductions, pooling, and those that only move values."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from mpanet_jax.errors import UserError
from mpanet_jax.export.equations import Equation
from mpanet_jax.export.onnx_graph import Computed, Constant, Graph, Value


def shape_of(value: Value) -> tuple[Any, ...]:
    """The lengths of a value's axes; an axis along which it repeats may have length 1."""
    return value.array.shape if isinstance(value, Constant) else value.shape


def _broadcast(shapes: Sequence[tuple[Any, ...]]) -> tuple[Any, ...]:
    rank = max(map(len, shapes))
    padded = [(1,) * (rank - len(shape)) + tuple(shape) for shape in shapes]
    return tuple(
        next((n for n in lengths if not (isinstance(n, int) and n == 1)), 1) for lengths in zip(*padded, strict=True)
    )


def unsupported(equation: Equation) -> UserError:
    """The error for a primitive, or a form of it, that this export does not support."""
    return UserError(
        f"the network computes {equation.primitive!r} in a form that this ONNX export does not support; "
        "write a .stablehlo file instead, which can hold whatever JAX computes"
    )


def constant_of(array: Any) -> Constant:
    """An array as a constant; floats become float64."""
    array = np.asarray(array)
    return Constant(array.astype(np.float64) if array.dtype.kind in "fV" else array)


class ShapeWriter:
    """Translates the primitives that it has methods for, named '_' + primitive; each gives the result's value."""

    def __init__(self, graph: Graph):
        self.graph = graph

    def _joined(self, kind: str, inputs: Sequence[Value], types: Sequence[Any]) -> Computed:
        """Add a node whose inputs are broadcast against each other."""
        first = any(isinstance(value, Computed) and value.channels_first for value in inputs)
        inputs = [
            Constant(value.array.astype(dtype)) if isinstance(value, Constant) else value
            for value, dtype in zip(inputs, types, strict=False)
        ]
        name = self.graph.add_node(kind, [self.graph.as_first(v) if first else self.graph.as_last(v) for v in inputs])
        return Computed(name, _broadcast([shape_of(value) for value in inputs]), first)

    # ---- along axes ----

    def _reduced(self, equation: Equation, x: Value, kind: str, function: Callable[..., Any], **options: Any) -> Value:
        axes = tuple(equation.params["axes"])
        if isinstance(x, Constant) and shape_of(x) == tuple(equation.input_avals[0].shape):
            return Constant(function(x.array, axis=axes))
        x = self._full(x, equation.input_avals[0].shape)
        assert isinstance(x, Computed)
        first = x.channels_first and axes in ((1, 2), (3,), (1, 2, 3))
        places = [{0: 0, 1: 2, 2: 3, 3: 1}[axis] for axis in axes] if first else list(axes)
        name = x.name if first else self.graph.as_last(x)
        if kind == "ArgMax":
            name = self.graph.add_node(kind, [name], axis=places[0], keepdims=0)
        else:
            name = self.graph.add_node(kind, [name, self.graph.add_constant(np.array(places, np.int64))], keepdims=0)
        return Computed(name, tuple(equation.avals[0].shape))

    def _reduce_sum(self, equation: Equation, x: Value) -> Value:
        return self._reduced(equation, x, "ReduceSum", np.sum)

    def _reduce_max(self, equation: Equation, x: Value) -> Value:
        return self._reduced(equation, x, "ReduceMax", np.max)

    def _reduce_min(self, equation: Equation, x: Value) -> Value:
        return self._reduced(equation, x, "ReduceMin", np.min)

    def _argmax(self, equation: Equation, x: Value) -> Value:
        import onnx

        index = self._reduced(equation, x, "ArgMax", np.argmax)
        assert isinstance(index, Computed)
        to = onnx.helper.np_dtype_to_tensor_dtype(np.dtype(equation.params["index_dtype"]))
        return Computed(self.graph.add_node("Cast", [index.name], to=to), index.shape)

    def _pool(self, equation: Equation, x: Value, kind: str, **attributes: Any) -> Computed:
        params = equation.params
        window, strides, padding = (params[f] for f in ("window_dimensions", "window_strides", "padding"))
        plain = {*params["base_dilation"], *params["window_dilation"]} == {1}
        if not plain or len(window) != 4 or {window[0], window[3], strides[0], strides[3]} != {1}:
            raise unsupported(equation)
        pads = [before for before, _ in padding[1:3]] + [after for _, after in padding[1:3]]
        source = self.graph.as_first(self._full(x, equation.input_avals[0].shape))
        name = self.graph.add_node(
            kind, [source], kernel_shape=window[1:3], strides=strides[1:3], pads=pads, **attributes
        )
        return Computed(name, tuple(equation.avals[0].shape), True)

    def _reduce_window_max(self, equation: Equation, x: Value) -> Value:
        return self._pool(equation, x, "MaxPool")

    def _reduce_window_sum(self, equation: Equation, x: Value) -> Value:
        mean = self._pool(equation, x, "AveragePool", count_include_pad=1)
        size = np.asarray(np.prod(equation.params["window_dimensions"]), np.float32)
        return self._joined("Mul", [mean, Constant(size)], [np.float32] * 2)

    def _gather(self, equation: Equation, x: Value, indices: Value) -> Value:
        """Supports `jnp.take_along_axis`, and slices that start at a known place."""
        numbers, axes = equation.params["dimension_numbers"], range(len(equation.input_avals[0].shape))
        along = numbers.start_index_map
        if isinstance(indices, Constant) and indices.array.ndim == 1 and not numbers.operand_batching_dims:
            sizes = [equation.params["slice_sizes"][axis] for axis in along]
            return self._part(equation, x, along, indices.array, indices.array + sizes, numbers.collapsed_slice_dims)
        others = tuple(axis for axis in axes if axis not in along)
        if (
            len(along) != 1
            or numbers.offset_dims
            or numbers.collapsed_slice_dims != along
            or numbers.operand_batching_dims != others
            or numbers.start_indices_batching_dims != others
        ):
            raise unsupported(equation)
        shape = tuple(equation.avals[0].shape)
        index = self._reshaped(indices, equation.input_avals[1].shape, shape)
        data = self.graph.as_last(self._full(x, equation.input_avals[0].shape))
        return Computed(self.graph.add_node("GatherElements", [data, self.graph.as_last(index)], axis=along[0]), shape)

    # ---- shapes ----

    def _full(self, value: Value, shape: Sequence[Any]) -> Value:
        """The value with all its axes at full length."""
        if shape_of(value) == tuple(shape):
            return value
        if isinstance(value, Constant):
            if all(isinstance(n, int) for n in shape):
                return Constant(np.broadcast_to(value.array, shape))
            value = Computed(self.graph.add_constant(value.array), value.array.shape)
        if sum(not isinstance(n, int) for n in shape) > 0 and value.shape[0] == 1:
            raise UserError(
                "the network computes a value that is the same for all images and then reshapes it to the batch, which "
                "ONNX cannot express for a dynamic batch; give a number of images as the batch, or write .stablehlo"
            )
        name = self.graph.as_last(value)
        sizes = np.array([n if isinstance(n, int) else 1 for n in shape], np.int64)  # 1 keeps the axis as it is
        return Computed(self.graph.add_node("Expand", [name, self.graph.add_constant(sizes)]), tuple(shape))

    def _broadcast_in_dim(self, equation: Equation, x: Value, *_: Value) -> Value:
        rank, places = len(equation.params["shape"]), equation.params["broadcast_dimensions"]
        if isinstance(x, Constant):
            sizes = np.ones(rank, int)
            sizes[list(places)] = x.array.shape if x.array.ndim else ()
            return Constant(x.array.reshape(sizes))
        if len(places) == rank:
            return x
        if rank == 4 and tuple(places) == (0, 3):  # one value a channel, for convolutions and masks
            name = self.graph.add_node("Unsqueeze", [self.graph.as_last(x), self.graph.add_constant(np.array([2, 3]))])
            return Computed(name, (x.shape[0], 1, 1, x.shape[1]), True)
        new = [axis for axis in range(rank) if axis not in places]
        name = self.graph.add_node("Unsqueeze", [self.graph.as_last(x), self.graph.add_constant(np.array(new))])
        shape: list[Any] = [1] * rank
        for place, length in zip(places, x.shape, strict=True):
            shape[place] = length
        return Computed(name, tuple(shape))

    def _reshape(self, equation: Equation, x: Value, *_: Value) -> Value:
        return self._reshaped(x, equation.input_avals[0].shape, equation.avals[0].shape)

    def _reshaped(self, x: Value, before: Sequence[Any], after: Sequence[Any]) -> Value:
        if isinstance(x, Constant) and x.array.size == 1:
            return Constant(x.array.reshape((1,) * len(after)))
        x = self._full(x, before)
        if isinstance(x, Constant):
            return Constant(x.array.reshape(after))
        if tuple(before) == tuple(after):
            return x
        unknown = [n for n in after if not isinstance(n, int)]
        if len(unknown) > 1:
            raise UserError("ONNX: a reshape of two axes of unknown length; write a .stablehlo file instead")
        sizes = np.array([n if isinstance(n, int) else -1 for n in after], np.int64)
        name = self.graph.add_node("Reshape", [self.graph.as_last(x), self.graph.add_constant(sizes)])
        return Computed(name, tuple(after))

    def _expand_dims(self, equation: Equation, x: Value) -> Value:
        return self._reshape(equation, x)

    def _squeeze(self, equation: Equation, x: Value) -> Value:
        axes = tuple(equation.params["dimensions"])
        if isinstance(x, Constant):
            return Constant(np.squeeze(x.array, axes))
        name = self.graph.add_node(
            "Squeeze", [self.graph.as_last(x), self.graph.add_constant(np.array(axes, np.int64))]
        )
        return Computed(name, tuple(n for axis, n in enumerate(x.shape) if axis not in axes))

    def _transpose(self, equation: Equation, x: Value) -> Value:
        order = equation.params["permutation"]
        if isinstance(x, Constant):
            return Constant(x.array.transpose(order))
        name = self.graph.add_node("Transpose", [self.graph.as_last(x)], perm=list(order))
        return Computed(name, tuple(x.shape[axis] for axis in order))

    def _rev(self, equation: Equation, x: Value) -> Value:
        axes = tuple(equation.params["dimensions"])
        if isinstance(x, Constant):
            return Constant(np.flip(x.array, axes))
        last = np.iinfo(np.int64).min
        numbers = (np.full(len(axes), n, np.int64) for n in (-1, last, axes, -1))
        starts, ends, places, steps = numbers
        inputs = [self.graph.add_constant(array) for array in (starts, ends, places, steps)]
        return Computed(self.graph.add_node("Slice", [self.graph.as_last(x), *inputs]), x.shape)

    def _slice(self, equation: Equation, x: Value) -> Value:
        params, before = equation.params, equation.input_avals[0].shape
        steps = params["strides"] or (1,) * len(before)
        parts = list(zip(params["start_indices"], params["limit_indices"], steps, strict=True))
        axes = [axis for axis, length in enumerate(before) if parts[axis] != (0, length, 1)]
        if not all(isinstance(number, int) for axis in axes for number in parts[axis]):
            raise unsupported(equation)
        starts, ends, steps = ([parts[axis][i] for axis in axes] for i in range(3))
        return self._part(equation, x, axes, starts, ends, steps=steps)

    def _part(
        self,
        equation: Equation,
        x: Value,
        axes: Sequence[int],
        starts: Any,
        ends: Any,
        removed: Sequence[int] = (),
        steps: Sequence[int] | None = None,
    ) -> Value:
        """The part of x between starts and ends along some axes; the axes `removed`, then of length 1, are dropped."""
        x, steps = self._full(x, equation.input_avals[0].shape), steps or [1] * len(axes)
        if isinstance(x, Constant):
            ranges = {axis: slice(*part) for axis, *part in zip(axes, starts, ends, steps, strict=True)}
            part = x.array[tuple(ranges.get(axis, slice(None)) for axis in range(x.array.ndim))]
            return Constant(part.squeeze(tuple(removed)))
        inputs = [self.graph.add_constant(np.array(numbers, np.int64)) for numbers in (starts, ends, axes, steps)]
        name = self.graph.add_node("Slice", [self.graph.as_last(x), *inputs])
        if removed:
            name = self.graph.add_node("Squeeze", [name, self.graph.add_constant(np.array(removed, np.int64))])
        return Computed(name, tuple(equation.avals[0].shape))

    def _concatenate(self, equation: Equation, *parts: Value) -> Value:
        return self._concatenated(equation, parts, equation.params["dimension"])

    def _concatenated(self, equation: Equation, parts: Sequence[Value], axis: int) -> Value:
        whole = [self._full(part, aval.shape) for part, aval in zip(parts, equation.input_avals, strict=True)]
        if all(isinstance(part, Constant) for part in whole):
            return Constant(np.concatenate([part.array for part in whole if isinstance(part, Constant)], axis))
        name = self.graph.add_node("Concat", [self.graph.as_last(part) for part in whole], axis=axis)
        return Computed(name, tuple(equation.avals[0].shape))

    def _stack(self, equation: Equation, *parts: Value) -> Value:
        axis, pieces = equation.params["axis"], []
        for part, aval in zip(parts, equation.input_avals, strict=True):
            shape = (*aval.shape[:axis], 1, *aval.shape[axis:])
            part = self._full(part, aval.shape)
            if isinstance(part, Constant):
                pieces.append(self.graph.add_constant(part.array.reshape(shape)))
                continue
            place = self.graph.add_constant(np.array([axis], np.int64))
            pieces.append(self.graph.add_node("Unsqueeze", [self.graph.as_last(part), place]))
        return Computed(self.graph.add_node("Concat", pieces, axis=axis), tuple(equation.avals[0].shape))

    def _iota(self, equation: Equation, *_: Value) -> Value:
        shape, axis = equation.params["shape"], equation.params["dimension"]
        if not isinstance(shape[axis], int):
            raise unsupported(equation)
        sizes = [1] * len(shape)
        sizes[axis] = shape[axis]
        return constant_of(np.arange(shape[axis], dtype=equation.params["dtype"]).reshape(sizes))
