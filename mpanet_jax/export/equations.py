"""A JAX function as a flat list of primitive equations: calls are inlined, and unused values are left out."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

# Primitives that only call another jaxpr, besides those of custom gradients; and the parameters that hold that jaxpr.
_CALLS = ("pjit", "jit", "closed_call", "core_call", "remat", "checkpoint")
_BODIES = ("jaxpr", "call_jaxpr", "fun_jaxpr")

Key = int  # identifies a value


@dataclass(frozen=True)
class Equation:
    """`outputs = primitive(inputs)`.

    Attributes:
      primitive: the primitive's name in JAX.
      params: its parameters.
      inputs: the key of a value, or an array for a constant.
      outputs: keys.
      avals: shapes and types of the outputs.
      input_avals: shapes and types of the inputs.
    """

    primitive: str
    params: Mapping[str, Any]
    inputs: Sequence[Key | np.ndarray]
    outputs: Sequence[Key]
    avals: Sequence[Any]
    input_avals: Sequence[Any]


@dataclass(frozen=True)
class Equations:
    """A function with one result, as equations.

    Attributes:
      inputs: the keys of its arguments.
      constants: {key: array} of the arrays that it closes over.
      equations: in an order in which they can be computed.
      output: the key of the result, or an array if it is a constant.
      uses: how often each value is read; returning the result counts as reading it.
    """

    inputs: Sequence[Key]
    constants: Mapping[Key, np.ndarray]
    equations: Sequence[Equation]
    output: Key | np.ndarray
    uses: Counter


def equations_of(function: Callable[..., Any], *arguments: Any) -> Equations:
    """Trace a function with one result on `arguments`, arrays or `jax.ShapeDtypeStruct`s, and give its equations."""
    closed = jax.make_jaxpr(function)(*arguments)
    flat = _Flattener()
    scope: dict[Any, Key | np.ndarray] = {}
    inputs = [flat.new(scope, variable) for variable in closed.jaxpr.invars]
    constants = {
        flat.new(scope, variable): np.asarray(value)
        for variable, value in zip(closed.jaxpr.constvars, closed.consts, strict=True)
    }
    flat.inline(closed.jaxpr, scope)
    (result,) = closed.jaxpr.outvars
    output = _read(scope, result)

    uses, kept = Counter([output] if isinstance(output, Key) else []), []
    for equation in reversed(flat.equations):
        if any(uses[key] for key in equation.outputs):
            kept.append(equation)
            uses.update(value for value in equation.inputs if isinstance(value, Key))
    return Equations(inputs, {k: a for k, a in constants.items() if uses[k]}, kept[::-1], output, uses)


def _read(scope: Mapping[Any, Key | np.ndarray], atom: Any) -> Key | np.ndarray:
    return np.asarray(atom.val, atom.aval.dtype) if hasattr(atom, "val") else scope[atom]


class _Flattener:
    def __init__(self):
        self.equations: list[Equation] = []
        self._next = 0

    def new(self, scope: dict[Any, Key | np.ndarray], variable: Any) -> Key:
        self._next += 1
        scope[variable] = self._next
        return self._next

    def inline(self, jaxpr: Any, scope: dict[Any, Key | np.ndarray]) -> None:
        """Adds the equations of a jaxpr whose arguments and constants are in `scope`."""
        for equation in jaxpr.eqns:
            inputs = [_read(scope, atom) for atom in equation.invars]
            name, params = equation.primitive.name, equation.params
            calls = name in _CALLS or name.startswith("custom_")
            body = next((params[b] for b in _BODIES if b in params), None) if calls else None
            if body is None:
                outputs = [self.new(scope, variable) for variable in equation.outvars]
                avals = [variable.aval for variable in equation.outvars]
                input_avals = [atom.aval for atom in equation.invars]
                self.equations.append(Equation(name, params, inputs, outputs, avals, input_avals))
                continue
            inner, constants = getattr(body, "jaxpr", body), getattr(body, "consts", ())
            below: dict[Any, Key | np.ndarray] = dict(zip(inner.invars, inputs, strict=True))
            below |= {v: np.asarray(c) for v, c in zip(inner.constvars, constants, strict=True)}
            self.inline(inner, below)
            for variable, result in zip(equation.outvars, inner.outvars, strict=True):
                scope[variable] = _read(below, result)
