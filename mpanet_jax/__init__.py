"""MPANet (CVPR 2021), visible-infrared person re-identification, in JAX and Flax."""

import importlib
import importlib.metadata
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mpanet_jax.embeddings import Embeddings
    from mpanet_jax.errors import UserError
    from mpanet_jax.evaluation.evaluate import evaluate
    from mpanet_jax.evaluation.search import Index
    from mpanet_jax.loop import train
    from mpanet_jax.methods.mpanet import MPANetSettings as Settings
    from mpanet_jax.model import Model, load

    __version__: str

__all__ = [
    "Embeddings",
    "Index",
    "Model",
    "Settings",
    "UserError",
    "__version__",
    "evaluate",
    "load",
    "train",
]

# Where the public names are. Importing this package imports none of these modules, and not JAX.
_HOMES = {
    "Embeddings": "embeddings.Embeddings",
    "Index": "evaluation.search.Index",
    "Model": "model.Model",
    "Settings": "methods.mpanet.MPANetSettings",
    "UserError": "errors.UserError",
    "evaluate": "evaluation.evaluate.evaluate",
    "load": "model.load",
    "train": "loop.train",
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        value: Any = importlib.metadata.version(__name__)
    elif name in _HOMES:
        module, _, attribute = _HOMES[name].rpartition(".")
        value = getattr(importlib.import_module(f"{__name__}.{module}"), attribute)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
