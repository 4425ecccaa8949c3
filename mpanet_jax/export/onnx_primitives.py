"""JAX's primitives as ONNX nodes: those of networks that are evaluated. `write_equations` applies them one by one."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from scipy.special import erf, expit

from mpanet_jax.errors import UserError
from mpanet_jax.export.equations import Equation, Equations
from mpanet_jax.export.onnx_graph import Computed, Constant, Graph, Value

# primitive: (ONNX node, the same for constants)
_ELEMENTWISE: dict[str, tuple[str, Callable[..., Any]]] = {
    **{"add": ("Add", np.add), "sub": ("Sub", np.subtract), "mul": ("Mul", np.multiply), "div": ("Div", np.divide)},
    **{"max": ("Max", np.maximum), "min": ("Min", np.minimum), "pow": ("Pow", np.power)},
    **{"exp": ("Exp", np.exp), "log": ("Log", np.log), "tanh": ("Tanh", np.tanh), "sqrt": ("Sqrt", np.sqrt)},
    **{"neg": ("Neg", np.negative), "abs": ("Abs", np.abs), "sign": ("Sign", np.sign), "floor": ("Floor", np.floor)},
    **{"logistic": ("Sigmoid", expit), "erf": ("Erf", erf), "sin": ("Sin", np.sin), "cos": ("Cos", np.cos)},
    **{"eq": ("Equal", np.equal), "lt": ("Less", np.less), "gt": ("Greater", np.greater)},
    **{"le": ("LessOrEqual", np.less_equal), "ge": ("GreaterOrEqual", np.greater_equal)},
    **{"and": ("And", np.logical_and), "or": ("Or", np.logical_or), "not": ("Not", np.logical_not)},
}
_ALIASES = ("stop_gradient", "copy", "copy_p")


def write_equations(graph: Graph, equations: Equations, values: dict[int, Value]) -> Value:
    """Adds all equations to the graph and returns the result's value. `values` has those of the inputs.

    Raises:
      UserError: a primitive that has no ONNX form here.
    """
    writer = _Writer(graph, equations, values)
    for equation in equations.equations:
        writer.write(equation)
    return writer.value(equations.output)


def _constant(array: Any) -> Constant:
    array = np.asarray(array)
    return Constant(array.astype(np.float64) if array.dtype.kind in "fV" else array)


class _Writer:
    def __init__(self, graph: Graph, equations: Equations, values: dict[int, Value]):
        self.graph, self.uses, self.values = graph, equations.uses, values
        values |= {key: _constant(array) for key, array in equations.constants.items()}

    def value(self, key: int | np.ndarray) -> Value:
        return _constant(key) if isinstance(key, np.ndarray) else self.values[key]

    def write(self, equation: Equation) -> None:
        method = getattr(self, f"_{equation.primitive}", None)
        inputs = [self.value(key) for key in equation.inputs]
        if equation.primitive in _ELEMENTWISE:
            result = self._elementwise(equation, inputs)
        elif equation.primitive in _ALIASES:
            result = inputs[0]
        elif method is not None:
            result = method(equation, *inputs)
        else:
            raise _unsupported(equation)
        self.values[equation.outputs[0]] = result

    # ---- element by element ----

    def _elementwise(self, equation: Equation, inputs: Sequence[Value]) -> Value:
        kind, function = _ELEMENTWISE[equation.primitive]
        constants = [value.array for value in inputs if isinstance(value, Constant)]
        if len(constants) == len(inputs):
            return Constant(np.asarray(function(*constants)))
        if len(inputs) == 2 and len(constants) == 1 and equation.avals[0].dtype.kind == "f":
            folded = self._fold(equation, inputs, constants[0])
            if folded is not None:
                return folded
        if (
            equation.primitive == "max"
            and constants
            and not np.any(constants[0])
            and equation.avals[0].dtype.kind == "f"
        ):
            kind, inputs = "Relu", [value for value in inputs if isinstance(value, Computed)]
        return self._joined(kind, inputs, [aval.dtype for aval in equation.input_avals])

    def _joined(self, kind: str, inputs: Sequence[Value], types: Sequence[Any]) -> Computed:
        """A node whose inputs broadcast."""
        first = any(isinstance(value, Computed) and value.channels_first for value in inputs)
        inputs = [
            Constant(value.array.astype(dtype)) if isinstance(value, Constant) else value
            for value, dtype in zip(inputs, types, strict=False)
        ]
        name = self.graph.node(kind, [self.graph.as_first(v) if first else self.graph.as_last(v) for v in inputs])
        return Computed(name, _broadcast([_shape(value) for value in inputs]), first)

    def _fold(self, equation: Equation, inputs: Sequence[Value], array: np.ndarray) -> Value | None:
        """Takes a factor or summand into the layer before it, or makes it a layer that takes in the next."""
        primitive, constant_first = equation.primitive, isinstance(inputs[0], Constant)
        if primitive not in ("add", "sub", "mul", "div") or (primitive == "div" and constant_first):
            return None
        value = inputs[constant_first]
        assert isinstance(value, Computed)
        array = array.reshape((1,) * (len(value.shape) - array.ndim) + array.shape)
        if any(n not in (1, m) for n, m in zip(array.shape, value.shape, strict=True)):
            return None  # the result repeats along an axis along which the value does not
        layer = value.layer
        if layer is None or not layer.takes(array) or self.uses[equation.inputs[constant_first]] > 1:
            layer = self.graph.layer("Affine", value.name, len(value.shape), channels_first=value.channels_first)
        if primitive == "sub" and constant_first:
            layer.multiply(np.full_like(array, -1))
        if primitive in ("add", "sub"):
            layer.add(-array if primitive == "sub" and not constant_first else array)
        else:
            layer.multiply(1 / array if primitive == "div" else array)
        return Computed(layer.output, value.shape, value.channels_first, layer)

    def _rsqrt(self, equation: Equation, x: Value) -> Value:
        if isinstance(x, Constant):
            return Constant(1 / np.sqrt(x.array))
        name = self.graph.node("Reciprocal", [self.graph.node("Sqrt", [x.name])])
        return Computed(name, x.shape, x.channels_first)

    def _square(self, equation: Equation, x: Value) -> Value:
        if isinstance(x, Constant):
            return Constant(np.square(x.array))
        return Computed(self.graph.node("Mul", [x.name, x.name]), x.shape, x.channels_first)

    def _integer_pow(self, equation: Equation, x: Value) -> Value:
        power = np.asarray(equation.params["y"], np.float64)
        if isinstance(x, Constant):
            return Constant(x.array**power)
        return self._joined("Pow", [x, Constant(power)], [np.float32] * 2)

    def _clamp(self, equation: Equation, least: Value, x: Value, most: Value) -> Value:
        types = [aval.dtype for aval in equation.input_avals]
        return self._joined("Min", [self._joined("Max", [x, least], types[1::-1]), most], types[1:])

    def _ne(self, equation: Equation, x: Value, y: Value) -> Value:
        equal = self._joined("Equal", [x, y], [aval.dtype for aval in equation.input_avals])
        return Computed(self.graph.node("Not", [equal.name]), equal.shape, equal.channels_first)

    def _select_n(self, equation: Equation, which: Value, *cases: Value) -> Value:
        if len(cases) != 2 or equation.input_avals[0].dtype != bool:
            raise _unsupported(equation)
        if isinstance(which, Constant) and (which.array.all() or not which.array.any()):
            return cases[int(which.array.all())]
        arrays = [value.array for value in (which, *cases[::-1]) if isinstance(value, Constant)]
        if len(arrays) == 3:
            return Constant(np.where(*arrays))
        types = [equation.input_avals[i].dtype for i in (0, 2, 1)]
        return self._joined("Where", [which, cases[1], cases[0]], types)

    def _convert_element_type(self, equation: Equation, x: Value) -> Value:
        dtype = np.dtype(equation.params["new_dtype"])
        if isinstance(x, Constant):
            return _constant(x.array.astype(dtype))
        if equation.input_avals[0].dtype == dtype:
            return x
        import onnx

        to = onnx.helper.np_dtype_to_tensor_dtype(dtype)
        return Computed(self.graph.node("Cast", [x.name], to=to), x.shape, x.channels_first)

    # ---- layers ----

    def _conv_general_dilated(self, equation: Equation, x: Value, kernel: Value) -> Value:
        params, numbers = equation.params, equation.params["dimension_numbers"]
        images = (0, 3, 1, 2)
        if (
            not isinstance(x, Computed)
            or not isinstance(kernel, Constant)
            or numbers.lhs_spec != images
            or numbers.out_spec != images
            or params["batch_group_count"] != 1
            or set(params["lhs_dilation"]) != {1}
        ):
            raise _unsupported(equation)
        weight = kernel.array.transpose(numbers.rhs_spec)
        attributes = {
            "kernel_shape": weight.shape[2:],
            "strides": params["window_strides"],
            "pads": [before for before, _ in params["padding"]] + [after for _, after in params["padding"]],
            "dilations": params["rhs_dilation"],
            "group": params["feature_group_count"],
        }
        source = self.graph.as_first(self._full(x, equation.input_avals[0].shape))
        layer = self.graph.layer("Conv", source, 4, channels_first=True, weight=weight, attributes=attributes)
        return Computed(layer.output, tuple(equation.avals[0].shape), True, layer)

    def _dot_general(self, equation: Equation, x: Value, y: Value) -> Value:
        (contracted, _), (batch, _) = numbers = equation.params["dimension_numbers"]
        if len(contracted) != 1:
            raise _unsupported(equation)
        if isinstance(x, Constant) and isinstance(y, Constant):
            raise _unsupported(equation)
        shapes = [aval.shape for aval in equation.input_avals]
        free = [
            [a for a in range(len(shape)) if a not in (*numbers[0][i], *numbers[1][i])]
            for i, shape in enumerate(shapes)
        ]
        shape = tuple(equation.avals[0].shape)
        if isinstance(y, Constant) and isinstance(x, Computed) and not batch and len(free[1]) == 1:
            if x.channels_first and contracted == (3,) and x.shape == tuple(shapes[0]):  # a 1×1 convolution
                weight = (y.array.T if numbers[0][1] == (0,) else y.array)[:, :, None, None]
                layer = self.graph.layer("Conv", x.name, 4, channels_first=True, weight=weight)
                return Computed(layer.output, shape, True, layer)
            source = self._permuted(x, shapes[0], [*free[0], contracted[0]])
            weight = y.array if numbers[0][1] == (0,) else y.array.T
            layer = self.graph.layer("MatMul", source, len(shape), weight=weight)
            return Computed(layer.output, shape, False, layer)
        if batch and any(len(axes) != 1 for axes in free):
            raise _unsupported(equation)
        left, right = 0, 1
        if len(free[1]) != 1:  # the many axes come first in ONNX
            left, right = 1, 0
        if len(free[right]) != 1:
            raise _unsupported(equation)
        operands = (x, y)
        (k_left,), (k_right,) = numbers[0][left], numbers[0][right]
        a = self._permuted(operands[left], shapes[left], [*numbers[1][left], *free[left], k_left])
        b = self._permuted(operands[right], shapes[right], [*numbers[1][right], k_right, *free[right]])
        name = self.graph.node("MatMul", [a, b])
        if left == 1:
            rank = len(shape)
            name = self.graph.node("Transpose", [name], perm=[rank - 1, *range(rank - 1)])
        return Computed(name, shape)

    def _permuted(self, value: Value, shape: Sequence[Any], order: Sequence[int]) -> str:
        """A whole value with its axes in that order."""
        value = self._full(value, shape)
        if isinstance(value, Constant):
            return self.graph.constant(value.array.transpose(order))
        name = self.graph.as_last(value)
        return name if list(order) == sorted(order) else self.graph.node("Transpose", [name], perm=list(order))

    # ---- along axes ----

    def _reduce(self, equation: Equation, x: Value, kind: str, function: Callable[..., Any], **options: Any) -> Value:
        axes = tuple(equation.params["axes"])
        if isinstance(x, Constant) and _shape(x) == tuple(equation.input_avals[0].shape):
            return Constant(function(x.array, axis=axes))
        x = self._full(x, equation.input_avals[0].shape)
        assert isinstance(x, Computed)
        first = x.channels_first and axes in ((1, 2), (3,), (1, 2, 3))
        places = [{0: 0, 1: 2, 2: 3, 3: 1}[axis] for axis in axes] if first else list(axes)
        name = x.name if first else self.graph.as_last(x)
        if kind == "ArgMax":
            name = self.graph.node(kind, [name], axis=places[0], keepdims=0)
        else:
            name = self.graph.node(kind, [name, self.graph.constant(np.array(places, np.int64))], keepdims=0)
        return Computed(name, tuple(equation.avals[0].shape))

    def _reduce_sum(self, equation: Equation, x: Value) -> Value:
        return self._reduce(equation, x, "ReduceSum", np.sum)

    def _reduce_max(self, equation: Equation, x: Value) -> Value:
        return self._reduce(equation, x, "ReduceMax", np.max)

    def _reduce_min(self, equation: Equation, x: Value) -> Value:
        return self._reduce(equation, x, "ReduceMin", np.min)

    def _argmax(self, equation: Equation, x: Value) -> Value:
        import onnx

        index = self._reduce(equation, x, "ArgMax", np.argmax)
        assert isinstance(index, Computed)
        to = onnx.helper.np_dtype_to_tensor_dtype(np.dtype(equation.params["index_dtype"]))
        return Computed(self.graph.node("Cast", [index.name], to=to), index.shape)

    def _pool(self, equation: Equation, x: Value, kind: str, **attributes: Any) -> Computed:
        params = equation.params
        window, strides, padding = (params[f] for f in ("window_dimensions", "window_strides", "padding"))
        plain = {*params["base_dilation"], *params["window_dilation"]} == {1}
        if not plain or len(window) != 4 or {window[0], window[3], strides[0], strides[3]} != {1}:
            raise _unsupported(equation)
        pads = [before for before, _ in padding[1:3]] + [after for _, after in padding[1:3]]
        source = self.graph.as_first(self._full(x, equation.input_avals[0].shape))
        name = self.graph.node(kind, [source], kernel_shape=window[1:3], strides=strides[1:3], pads=pads, **attributes)
        return Computed(name, tuple(equation.avals[0].shape), True)

    def _reduce_window_max(self, equation: Equation, x: Value) -> Value:
        return self._pool(equation, x, "MaxPool")

    def _reduce_window_sum(self, equation: Equation, x: Value) -> Value:
        mean = self._pool(equation, x, "AveragePool", count_include_pad=1)
        size = np.asarray(np.prod(equation.params["window_dimensions"]), np.float32)
        return self._joined("Mul", [mean, Constant(size)], [np.float32] * 2)

    def _gather(self, equation: Equation, x: Value, indices: Value) -> Value:
        """`jnp.take_along_axis`, and slices from a place that is known."""
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
            raise _unsupported(equation)
        shape = tuple(equation.avals[0].shape)
        index = self._reshaped(indices, equation.input_avals[1].shape, shape)
        data = self.graph.as_last(self._full(x, equation.input_avals[0].shape))
        return Computed(self.graph.node("GatherElements", [data, self.graph.as_last(index)], axis=along[0]), shape)

    # ---- shapes ----

    def _full(self, value: Value, shape: Sequence[Any]) -> Value:
        """The value with all its axes at their whole length."""
        if _shape(value) == tuple(shape):
            return value
        if isinstance(value, Constant):
            if all(isinstance(n, int) for n in shape):
                return Constant(np.broadcast_to(value.array, shape))
            value = Computed(self.graph.constant(value.array), value.array.shape)
        if sum(not isinstance(n, int) for n in shape) > 0 and value.shape[0] == 1:
            raise UserError(
                "the network computes something that is the same for all images and then reshapes it to the batch, "
                "which a dynamic batch cannot say in ONNX; give --batch a number, or write a .stablehlo file"
            )
        name = self.graph.as_last(value)
        sizes = np.array([n if isinstance(n, int) else 1 for n in shape], np.int64)  # 1 keeps what is there
        return Computed(self.graph.node("Expand", [name, self.graph.constant(sizes)]), tuple(shape))

    def _broadcast_in_dim(self, equation: Equation, x: Value, *_: Value) -> Value:
        rank, places = len(equation.params["shape"]), equation.params["broadcast_dimensions"]
        if isinstance(x, Constant):
            sizes = np.ones(rank, int)
            sizes[list(places)] = x.array.shape if x.array.ndim else ()
            return Constant(x.array.reshape(sizes))
        if len(places) == rank:
            return x
        if rank == 4 and tuple(places) == (0, 3):  # one value a channel, as convolutions and masks want it
            name = self.graph.node("Unsqueeze", [self.graph.as_last(x), self.graph.constant(np.array([2, 3]))])
            return Computed(name, (x.shape[0], 1, 1, x.shape[1]), True)
        new = [axis for axis in range(rank) if axis not in places]
        name = self.graph.node("Unsqueeze", [self.graph.as_last(x), self.graph.constant(np.array(new))])
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
        name = self.graph.node("Reshape", [self.graph.as_last(x), self.graph.constant(sizes)])
        return Computed(name, tuple(after))

    def _expand_dims(self, equation: Equation, x: Value) -> Value:
        return self._reshape(equation, x)

    def _squeeze(self, equation: Equation, x: Value) -> Value:
        axes = tuple(equation.params["dimensions"])
        if isinstance(x, Constant):
            return Constant(np.squeeze(x.array, axes))
        name = self.graph.node("Squeeze", [self.graph.as_last(x), self.graph.constant(np.array(axes, np.int64))])
        return Computed(name, tuple(n for axis, n in enumerate(x.shape) if axis not in axes))

    def _transpose(self, equation: Equation, x: Value) -> Value:
        order = equation.params["permutation"]
        if isinstance(x, Constant):
            return Constant(x.array.transpose(order))
        name = self.graph.node("Transpose", [self.graph.as_last(x)], perm=list(order))
        return Computed(name, tuple(x.shape[axis] for axis in order))

    def _rev(self, equation: Equation, x: Value) -> Value:
        axes = tuple(equation.params["dimensions"])
        if isinstance(x, Constant):
            return Constant(np.flip(x.array, axes))
        last = np.iinfo(np.int64).min
        numbers = (np.full(len(axes), n, np.int64) for n in (-1, last, axes, -1))
        starts, ends, places, steps = numbers
        inputs = [self.graph.constant(array) for array in (starts, ends, places, steps)]
        return Computed(self.graph.node("Slice", [self.graph.as_last(x), *inputs]), x.shape)

    def _slice(self, equation: Equation, x: Value) -> Value:
        params, before = equation.params, equation.input_avals[0].shape
        steps = params["strides"] or (1,) * len(before)
        parts = list(zip(params["start_indices"], params["limit_indices"], steps, strict=True))
        axes = [axis for axis, length in enumerate(before) if parts[axis] != (0, length, 1)]
        if not all(isinstance(number, int) for axis in axes for number in parts[axis]):
            raise _unsupported(equation)
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
        """The part of x between starts and ends along some axes, of which `removed` have length 1 then and go."""
        x, steps = self._full(x, equation.input_avals[0].shape), steps or [1] * len(axes)
        if isinstance(x, Constant):
            ranges = {axis: slice(*part) for axis, *part in zip(axes, starts, ends, steps, strict=True)}
            part = x.array[tuple(ranges.get(axis, slice(None)) for axis in range(x.array.ndim))]
            return Constant(part.squeeze(tuple(removed)))
        inputs = [self.graph.constant(np.array(numbers, np.int64)) for numbers in (starts, ends, axes, steps)]
        name = self.graph.node("Slice", [self.graph.as_last(x), *inputs])
        if removed:
            name = self.graph.node("Squeeze", [name, self.graph.constant(np.array(removed, np.int64))])
        return Computed(name, tuple(equation.avals[0].shape))

    def _concatenate(self, equation: Equation, *parts: Value) -> Value:
        return self._concatenated(equation, parts, equation.params["dimension"])

    def _concatenated(self, equation: Equation, parts: Sequence[Value], axis: int) -> Value:
        whole = [self._full(part, aval.shape) for part, aval in zip(parts, equation.input_avals, strict=True)]
        if all(isinstance(part, Constant) for part in whole):
            return Constant(np.concatenate([part.array for part in whole if isinstance(part, Constant)], axis))
        name = self.graph.node("Concat", [self.graph.as_last(part) for part in whole], axis=axis)
        return Computed(name, tuple(equation.avals[0].shape))

    def _stack(self, equation: Equation, *parts: Value) -> Value:
        axis, pieces = equation.params["axis"], []
        for part, aval in zip(parts, equation.input_avals, strict=True):
            shape = (*aval.shape[:axis], 1, *aval.shape[axis:])
            part = self._full(part, aval.shape)
            if isinstance(part, Constant):
                pieces.append(self.graph.constant(part.array.reshape(shape)))
                continue
            place = self.graph.constant(np.array([axis], np.int64))
            pieces.append(self.graph.node("Unsqueeze", [self.graph.as_last(part), place]))
        return Computed(self.graph.node("Concat", pieces, axis=axis), tuple(equation.avals[0].shape))

    def _iota(self, equation: Equation, *_: Value) -> Value:
        shape, axis = equation.params["shape"], equation.params["dimension"]
        if not isinstance(shape[axis], int):
            raise _unsupported(equation)
        sizes = [1] * len(shape)
        sizes[axis] = shape[axis]
        return _constant(np.arange(shape[axis], dtype=equation.params["dtype"]).reshape(sizes))


def _shape(value: Value) -> tuple[Any, ...]:
    return value.array.shape if isinstance(value, Constant) else value.shape


def _broadcast(shapes: Sequence[tuple[Any, ...]]) -> tuple[Any, ...]:
    rank = max(map(len, shapes))
    padded = [(1,) * (rank - len(shape)) + tuple(shape) for shape in shapes]
    return tuple(
        next((n for n in lengths if not (isinstance(n, int) and n == 1)), 1) for lengths in zip(*padded, strict=True)
    )


def _unsupported(equation: Equation) -> UserError:
    return UserError(
        f"the network computes {equation.primitive!r} in a form that this ONNX export has not; "
        "write a .stablehlo file instead, which holds all that JAX computes"
    )
