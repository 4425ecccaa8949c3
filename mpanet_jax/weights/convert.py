"""Whole jobs with weights: read them from anywhere, convert them, start a network from them."""

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict
from orbax.checkpoint import v1 as ocp

from mpanet_jax import run_files
from mpanet_jax.checkpoint import load_model
from mpanet_jax.errors import UserError
from mpanet_jax.methods import make_method, settings_of
from mpanet_jax.methods.method import Method
from mpanet_jax.settings import Settings, differences, to_dict
from mpanet_jax.state import init_variables, random_keys
from mpanet_jax.weights import files
from mpanet_jax.weights.hub import resolve
from mpanet_jax.weights.names import Variables, backbone_of, from_state_dict, to_state_dict


def template_of(method: Method, num_ids: int) -> Variables:
    """The shapes of a method's variables for `num_ids` identities."""
    network = method.network(num_ids)
    variables = jax.eval_shape(lambda key: init_variables(network, key, 32, 32), jax.random.key(0))
    return {**variables, "averages": method.averaged(variables["params"])}


def settings_of_weights(source: str | Path) -> Settings | None:
    """The settings that were stored with weights: a run's config.json, or a .safetensors file's metadata."""
    path = Path(source)
    if path.is_dir():
        return run_files.load_settings(path) if (path / run_files.CONFIG_FILE).exists() else None
    tree = files.read_metadata_settings(resolve(str(source)))
    try:
        return None if tree is None else settings_of(tree)
    except (UserError, TypeError, AttributeError) as error:
        raise UserError(f"{source}: its metadata are not a run's settings ({error})") from error


def read_weights(
    source: str | Path,
    *,
    settings: Settings | None = None,
    num_ids: int | None = None,
    drop_classifiers: bool = False,
) -> tuple[Settings, Variables, list[str]]:
    """Reads weights of any kind: a file, `hf:owner/repository`, a workdir, or a folder that `convert` wrote.

    Args:
      source: where they are.
      settings: of the network, for weights that carry none (the published program's); None takes the paper's. Weights
        that carry settings have to be of the same network, and keep theirs.
      num_ids: identities that the classifiers must tell apart; None takes the file's.
      drop_classifiers: leave the classifiers and their averages out.

    Returns:
      The settings, the variables, and the names that were left out, as `from_state_dict`.

    Raises:
      UserError: not there, not readable, or not the weights of this network.
    """
    stored, advice = settings_of_weights(source), ""
    if stored and settings:
        _check_same_network(stored, settings, source)
    elif not stored and not settings:
        advice = (
            "weights that carry no settings are taken for the paper's MPANet; name another network with "
            "--config=configs/NAME.py --config.model.…"
        )
    settings = stored or settings or settings_of({})
    method = make_method(settings)
    names = method.names()
    if Path(source).is_dir():
        _, variables = load_model(Path(source))
        state_dict = to_state_dict(variables, names)
    else:
        state_dict = files.read_state_dict(resolve(str(source)))
    in_file = next((len(a) for name, a in state_dict.items() if names.is_classifier(name) and a.ndim), 1)
    template = template_of(method, num_ids or in_file)
    variables, left_out = from_state_dict(
        state_dict, template, names, drop_classifiers=drop_classifiers, source=source, advice=advice
    )
    return settings, variables, left_out


def _check_same_network(stored: Settings, given: Settings, source: str | Path) -> None:
    differing = [
        f"{name} = {here!r} ({there!r} there)"
        for name, (here, there) in differences(given, stored).items()
        if name == "method" or (name.startswith("model.") and name != "model.fused")
    ]
    if differing:
        raise UserError(
            f"{source}: its weights are stored as those of another network, {', '.join(differing)}; leave the settings "
            "out, as they come with the weights, or name other weights"
        )


def convert(source: str | Path, target: str | Path, **options: Any) -> list[str]:
    """Converts weights of any kind (`read_weights`, whose options these are) and returns the names left out.

    `target` ending in .safetensors or .pth gets a state dict in the published names; any other name becomes a folder
    with an orbax checkpoint and the settings, which `evaluate` and `extract` read as they read a workdir.

    Raises:
      UserError: as `read_weights`, or the target folder exists.
    """
    target = Path(target)
    if target.suffix in files.FILE_SUFFIXES:
        if target.suffix in files.TORCH_SUFFIXES:
            files.import_torch(target)  # before the work, not after it
        settings, variables, left_out = read_weights(source, **options)
        state_dict = to_state_dict(variables, make_method(settings).names())
        files.write_state_dict(target, state_dict, to_dict(settings))
        return left_out
    if target.exists():
        suffixes = ", ".join(files.FILE_SUFFIXES)
        raise UserError(f"{target}: exists already; give a new folder, or a name ending in {suffixes}")
    settings, variables, left_out = read_weights(source, **options)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        with ocp.training.Checkpointer(str((temporary / "checkpoints").resolve())) as checkpointer:
            checkpointer.save_checkpointables(0, {"model": variables})
        run_files.save_settings(settings, temporary)
        temporary.rename(target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return left_out


def load_backbone(init_from: str, method: Method, variables: Mapping[str, Any]) -> dict[str, Any]:
    """Puts pretrained weights into a network's backbone; everything else stays.

    Args:
      init_from: `settings.init_from`: a `.safetensors` or `.pth` file, or `hf:owner/repository`. Of a whole network the
        backbone is taken.
      method: whose names the backbone's arrays have.
      variables: the network's {"params", "batch_stats"}.

    Returns:
      The variables with the backbone's arrays replaced, in the types that they had.

    Raises:
      UserError: the weights cannot be had, or are not of this backbone.
    """
    names, template = method.names(), {name: variables[name] for name in ("params", "batch_stats")}
    advice = "config.model.backbone, stage_sizes and width say which backbone is expected"
    try:
        state_dict = backbone_of(files.read_state_dict(resolve(init_from)), template, names)
        loaded, _ = from_state_dict(state_dict, template, names, source=init_from, advice=advice)
    except UserError as error:
        raise UserError(f"config.init_from: {error}") from error
    arrays = {path: jnp.asarray(array) for path, array in flatten_dict(loaded).items()}
    return unflatten_dict({**flatten_dict(template), **arrays})


def initial_variables(method: Method, num_ids: int) -> dict[str, Any]:
    """{params, batch_stats} before training: drawn from settings.seed, the backbone from settings.init_from if set.

    Raises:
      UserError: settings.init_from cannot be had, or does not fit the network.
    """
    settings = method.settings
    key, _ = random_keys(settings.seed)
    variables = init_variables(method.network(num_ids), key, settings.data.height, settings.data.width)
    return load_backbone(settings.init_from, method, variables) if settings.init_from else variables
