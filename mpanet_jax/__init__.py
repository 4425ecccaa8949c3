"""MPANet (CVPR 2021), visible-infrared person re-identification, in JAX and Flax."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mpanet_jax.model import Model, load

__all__ = ["Model", "load"]

# Where the public names are; importing this package imports none of them, nor JAX.
_HOMES = {
    "Model": "model",
    "load": "model",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
