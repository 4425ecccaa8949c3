"""A network that is ready to embed images, from a training run or from a file of weights."""

from dataclasses import dataclass
from pathlib import Path

from mpanet_jax.checkpoint import load_model
from mpanet_jax.evaluation.extract import Embed
from mpanet_jax.evaluation.workdir import embed_of
from mpanet_jax.methods import make_method
from mpanet_jax.run_files import load_settings
from mpanet_jax.settings import DataSettings, Settings, replace
from mpanet_jax.weights.convert import read_weights
from mpanet_jax.weights.names import Variables


@dataclass(frozen=True)
class Network:
    """What it takes to embed images.

    Attributes:
      embed: see `Embed`; compiled, on all devices of this process, which divide the rows.
      data: the size of the images that it was trained with, and the filter that resized them.
      batch_size: b, or near it.
    """

    embed: Embed
    data: DataSettings
    batch_size: int


def network_of_workdir(workdir: str | Path, dtype: str | None = None) -> Network:
    """The last checkpoint of a training run, in the model, image size and precision of its config.json.

    `dtype` is another precision ('auto', 'float32', 'bfloat16').

    Raises:
      UserError: no config.json, no checkpoint, or one of a backbone alone.
    """
    settings = load_settings(workdir)
    _, variables = load_model(Path(workdir))
    return _network(settings, variables, dtype, f"--workdir={workdir}")


def network_of_weights(weights: str | Path, dtype: str | None = None, settings: Settings | None = None) -> Network:
    """The network of `weights`, which is anything that `read_weights` reads.

    `dtype` is the precision of convolutions and matrix products ('auto', 'float32', 'bfloat16'); None is that of the
    settings. `settings` are those of weights that carry none; None takes the paper's.

    Raises:
      UserError: not there, not readable, not of this network, or of a backbone alone, which has no embedding.
    """
    settings, variables, _ = read_weights(weights, settings=settings, drop_classifiers=True)
    return _network(settings, variables, dtype, f"--weights={weights}")


def _network(settings: Settings, variables: Variables, dtype: str | None, source: str) -> Network:
    settings = settings if dtype is None else replace(settings, {"dtype": dtype})
    embed = embed_of(make_method(settings), variables, source)
    return Network(embed, settings.data, settings.eval.batch_size)
