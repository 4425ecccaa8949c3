"""A network that is ready to embed images, from a training run or from a file of weights."""

from dataclasses import dataclass
from pathlib import Path

from mpanet_jax.checkpoint import load_model
from mpanet_jax.errors import UserError
from mpanet_jax.evaluation.workdir import Embed, make_embed
from mpanet_jax.experiment import CONFIG_FILE, compute_dtype, load_config, make_model
from mpanet_jax.weights import embedding_network, read_weights


@dataclass(frozen=True)
class Network:
    """What it takes to embed images.

    Attributes:
      embed: uint8[b, height, width, 3] → float[b, d], compiled, on all devices of this process; b divides over them.
      height, width: pixels of the images that it was trained with.
      batch_size: b, or near it.
    """

    embed: Embed
    height: int = 384
    width: int = 128
    batch_size: int = 256


def network_of_workdir(workdir: str | Path, dtype: str | None = None) -> Network:
    """The last checkpoint of a training run, in the model, image size and precision of its config.json.

    `dtype` is another precision ('auto', 'float32', 'bfloat16').

    Raises:
      UserError: no config.json or no checkpoint.
    """
    config = load_config(Path(workdir))
    _, variables = load_model(Path(workdir))
    if dtype is not None:
        config.dtype = dtype
    model = make_model(config, num_ids=variables["params"]["classifier"].shape[-1])
    embed = make_embed(model)({name: variables[name] for name in ("params", "batch_stats")})
    return Network(embed, config.data.height, config.data.width, config.eval.batch_size)


def network_of_weights(weights: str | Path, dtype: str | None = None) -> Network:
    """The MPANet of `weights`, which is anything that `weights.read_weights` reads.

    `dtype` is the precision of convolutions and matrix products ('auto', 'float32', 'bfloat16'); None is 'auto'.

    Raises:
      UserError: not there, not readable, not an MPANet (a bare ResNet-50 has no embedding), or a training run.
    """
    if (Path(weights) / CONFIG_FILE).exists():
        # Its arrays do not tell all of its modules apart (MAM from SE); its config does.
        raise UserError(f"--weights={weights}: this is a training run; use --workdir={weights}")
    variables, _ = read_weights(weights, drop_classifiers=True)
    try:
        model, variables = embedding_network(variables)
    except UserError as error:
        raise UserError(f"--weights={weights}: {error}; to train one from these, set config.init_from") from error
    return Network(make_embed(model.clone(dtype=compute_dtype(dtype or "auto")))(variables))
