"""Translates JAX's primitives, as far as networks use them in evaluation, into ONNX nodes."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from scipy.special import erf, expit

from mpanet_jax.export.equations import Equation, Equations
from mpanet_jax.export.onnx_graph import Computed, Constant, Graph, Value
from mpanet_jax.export.onnx_shapes import ShapeWriter, constant_of, unsupported

# JAX's primitive: (ONNX node, the same function of constants in NumPy)
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
    """Add all equations to the graph.

    Args:
      graph: the graph to add to.
      equations: the function to translate.
      values: {key: value} of the function's inputs.

    Returns:
      The value of the function's result.

    Raises:
      UserError: a primitive, or its form, is not supported.
    """
    writer = _Writer(graph, equations, values)
    for equation in equations.equations:
        writer.write(equation)
    return writer.value(equations.output)


class _Writer(ShapeWriter):
    def __init__(self, graph: Graph, equations: Equations, values: dict[int, Value]):
        super().__init__(graph)
        self.uses, self.values = equations.uses, values
        values |= {key: constant_of(array) for key, array in equations.constants.items()}

    def value(self, key: int | np.ndarray) -> Value:
        return constant_of(key) if isinstance(key, np.ndarray) else self.values[key]

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
            raise unsupported(equation)
        if isinstance(result, Computed) and result.layer is not None:
            for key, value in zip(equation.inputs, inputs, strict=True):
                if value is result and self.uses[key] > 1:  # others read the value itself: fold nothing into it
                    result = replace(result, layer=None)
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

    def _fold(self, equation: Equation, inputs: Sequence[Value], array: np.ndarray) -> Value | None:
        """Fold a factor or summand into the layer before it, or make it a layer that later ones are folded into."""
        primitive, constant_first = equation.primitive, isinstance(inputs[0], Constant)
        if primitive not in ("add", "sub", "mul", "div") or (primitive == "div" and constant_first):
            return None
        value = inputs[constant_first]
        assert isinstance(value, Computed)
        array = array.reshape((1,) * (len(value.shape) - array.ndim) + array.shape)
        if any(n not in (1, m) for n, m in zip(array.shape, value.shape, strict=True)):
            return None  # the result repeats along an axis along which the value does not
        layer = value.layer
        if layer is None or not layer.can_take(array) or self.uses[equation.inputs[constant_first]] > 1:
            layer = self.graph.add_layer("Affine", value.name, len(value.shape), channels_first=value.channels_first)
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
        name = self.graph.add_node("Reciprocal", [self.graph.add_node("Sqrt", [x.name])])
        return Computed(name, x.shape, x.channels_first)

    def _square(self, equation: Equation, x: Value) -> Value:
        if isinstance(x, Constant):
            return Constant(np.square(x.array))
        return Computed(self.graph.add_node("Mul", [x.name, x.name]), x.shape, x.channels_first)

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
        return Computed(self.graph.add_node("Not", [equal.name]), equal.shape, equal.channels_first)

    def _select_n(self, equation: Equation, which: Value, *cases: Value) -> Value:
        if len(cases) != 2 or equation.input_avals[0].dtype != bool:
            raise unsupported(equation)
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
            return constant_of(x.array.astype(dtype))
        if equation.input_avals[0].dtype == dtype:
            return x
        import onnx

        to = onnx.helper.np_dtype_to_tensor_dtype(dtype)
        return Computed(self.graph.add_node("Cast", [x.name], to=to), x.shape, x.channels_first)

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
            raise unsupported(equation)
        weight = kernel.array.transpose(numbers.rhs_spec)
        attributes = {
            "kernel_shape": weight.shape[2:],
            "strides": params["window_strides"],
            "pads": [before for before, _ in params["padding"]] + [after for _, after in params["padding"]],
            "dilations": params["rhs_dilation"],
            "group": params["feature_group_count"],
        }
        source = self.graph.as_first(self._full(x, equation.input_avals[0].shape))
        layer = self.graph.add_layer("Conv", source, 4, channels_first=True, weight=weight, attributes=attributes)
        return Computed(layer.output, tuple(equation.avals[0].shape), True, layer)

    def _dot_general(self, equation: Equation, x: Value, y: Value) -> Value:
        (contracted, _), (batch, _) = numbers = equation.params["dimension_numbers"]
        if len(contracted) != 1:
            raise unsupported(equation)
        if isinstance(x, Constant) and isinstance(y, Constant):
            raise unsupported(equation)
        shapes = [aval.shape for aval in equation.input_avals]
        free = [
            [a for a in range(len(shape)) if a not in (*numbers[0][i], *numbers[1][i])]
            for i, shape in enumerate(shapes)
        ]
        shape = tuple(equation.avals[0].shape)
        if isinstance(y, Constant) and isinstance(x, Computed) and not batch and len(free[1]) == 1:
            if x.channels_first and contracted == (3,) and x.shape == tuple(shapes[0]):  # a 1×1 convolution
                weight = (y.array.T if numbers[0][1] == (0,) else y.array)[:, :, None, None]
                layer = self.graph.add_layer("Conv", x.name, 4, channels_first=True, weight=weight)
                return Computed(layer.output, shape, True, layer)
            source = self._permuted(x, shapes[0], [*free[0], contracted[0]])
            weight = y.array if numbers[0][1] == (0,) else y.array.T
            layer = self.graph.add_layer("MatMul", source, len(shape), weight=weight)
            return Computed(layer.output, shape, False, layer)
        if batch and any(len(axes) != 1 for axes in free):
            raise unsupported(equation)
        left, right = 0, 1
        if len(free[1]) != 1:  # the many axes come first in ONNX
            left, right = 1, 0
        if len(free[right]) != 1:
            raise unsupported(equation)
        operands = (x, y)
        (k_left,), (k_right,) = numbers[0][left], numbers[0][right]
        a = self._permuted(operands[left], shapes[left], [*numbers[1][left], *free[left], k_left])
        b = self._permuted(operands[right], shapes[right], [*numbers[1][right], k_right, *free[right]])
        name = self.graph.add_node("MatMul", [a, b])
        if left == 1:
            rank = len(shape)
            name = self.graph.add_node("Transpose", [name], perm=[rank - 1, *range(rank - 1)])
        return Computed(name, shape)

    def _permuted(self, value: Value, shape: Sequence[Any], order: Sequence[int]) -> str:
        """The name of a value with its axes at full length and in that order."""
        value = self._full(value, shape)
        if isinstance(value, Constant):
            return self.graph.add_constant(value.array.transpose(order))
        name = self.graph.as_last(value)
        return name if list(order) == sorted(order) else self.graph.add_node("Transpose", [name], perm=list(order))
