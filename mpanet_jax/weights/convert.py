"""Whole jobs with weights: read them from anywhere, convert them, start a network from them."""

import re
from collections.abc import Callable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict
from orbax.checkpoint import v1 as ocp

from mpanet_jax import run_files
from mpanet_jax.checkpoint import load_model
from mpanet_jax.errors import SettingsError, UserError
from mpanet_jax.files import write_whole_folder
from mpanet_jax.methods import make_method, settings_of
from mpanet_jax.methods.method import Method
from mpanet_jax.settings import ModelSettings, Settings, differences, to_dict
from mpanet_jax.state import init_variables, random_keys
from mpanet_jax.weights import files
from mpanet_jax.weights.files import listed
from mpanet_jax.weights.hub import resolve
from mpanet_jax.weights.names import COUNTERS, Variables, from_state_dict, to_state_dict

# The fields of the settings that say which backbone it is.
BACKBONE_FIELDS = {f"model.{field.name}" for field in fields(ModelSettings)} - {"model.fused"}


def template_of(method: Method, num_ids: int) -> Variables:
    """The shapes of a method's variables for `num_ids` identities."""
    network = method.network(num_ids)
    variables = jax.eval_shape(lambda key: init_variables(network, key, 32, 32), jax.random.key(0))
    return {**variables, "averages": method.averaged(variables["params"])}


def number_of_ids(method: Method, variables: Variables) -> int:
    """How many identities the classifiers of `variables` tell apart; 1 where they were left out.

    The classifiers are the arrays that grow with the number of identities, whatever a method calls them.
    """
    given = flatten_dict(variables["params"])
    one, two = (flatten_dict(template_of(method, num_ids)["params"]) for num_ids in (1, 2))
    return next(
        (
            given[path].shape[axis]
            for path, leaf in one.items()
            for axis, (length, other) in enumerate(zip(leaf.shape, two[path].shape, strict=True))
            if length != other and path in given
        ),
        1,
    )


def settings_of_weights(source: str | Path) -> Settings | None:
    """The settings that were stored with weights: a run's config.json, or a .safetensors file's metadata."""
    path = resolve(str(source))
    if path.is_dir():
        return run_files.load_settings(path) if (path / run_files.CONFIG_FILE).exists() else None
    tree = files.read_metadata(path)
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
    advice: str = "",
) -> tuple[Settings, Variables, list[str]]:
    """Reads weights of any kind: a file, `hf:owner/repository`, a workdir, or a folder that `convert` wrote.

    Args:
      source: where they are.
      settings: of the network, for weights that carry none (the published program's); None takes the paper's. Weights
        that carry settings have to be of the same network, and keep theirs.
      num_ids: identities that the classifiers must tell apart; None takes the file's.
      drop_classifiers: leave the classifiers and their averages out.
      advice: what an error says in the end where the weights do not fit the network.

    Returns:
      The settings, the variables, and the names that were left out, as `from_state_dict`.

    Raises:
      UserError: not there, not readable, or not the weights of this network.
    """
    stored = settings_of_weights(source)
    if stored and settings:
        fix = "leave the settings out, as they come with the weights, or name other weights"
        _check_same_network(stored, settings, source, fix)
    elif not stored and not settings:
        advice = (
            "weights that carry no settings are taken for the paper's MPANet; name another network by "
            "its settings (of a script: --config=configs/NAME.py --config.model.…)"
        )
    settings = stored or settings or settings_of({})
    method = make_method(settings)
    names = method.names()
    path = resolve(str(source))
    if path.is_dir():
        _, variables = load_model(path)
        state_dict = to_state_dict(variables, names)
    else:
        state_dict = files.read_state_dict(path)
    in_file = next((len(a) for name, a in state_dict.items() if names.is_classifier(name) and a.ndim), 1)
    template = template_of(method, num_ids or in_file)
    variables, left_out = from_state_dict(
        state_dict, template, names, drop_classifiers=drop_classifiers, source=source, advice=advice
    )
    return settings, variables, left_out


def _check_same_network(
    stored: Settings, given: Settings, source: str | Path, fix: str, *, backbone_only: bool = False
) -> None:
    """Refuses weights of another method, backbone or modules by the names of both."""
    differing = {
        name: values
        for name, values in differences(given, stored).items()
        if name in BACKBONE_FIELDS
        or (not backbone_only and (name == "method" or (name.startswith("model.") and name != "model.fused")))
    }
    if "method" in differing:  # then the other fields are not each other's
        differing = {"method": differing["method"]}
    if differing:
        both = ", ".join(f"{name} = {here!r} ({there!r} there)" for name, (here, there) in differing.items())
        raise UserError(f"{source}: its weights are stored as those of another network, {both}; {fix}")


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
    with write_whole_folder(target) as folder:
        with ocp.training.Checkpointer(str((folder / "checkpoints").resolve())) as checkpointer:
            checkpointer.save_checkpointables(0, {"model": variables})
        run_files.save_settings(settings, folder)
    return left_out


def start_from(init_from: str, method: Method, variables: Mapping[str, Any]) -> tuple[dict[str, Any], str]:
    """Puts trained weights into a network that is to be trained.

    Of a bare backbone, such as ImageNet's, all arrays are taken and the rest of the network stays as it is. Of a whole
    network everything is taken but the classifiers. They stay as they are even where their number of identities fits:
    nothing in the weights says that the identities are the same ones.

    Args:
      init_from: `settings.init_from`, anything that `read_weights` reads; of a run its last checkpoint.
      method: of the network. Weights of a whole network that carry settings have to be of its method, backbone and
        modules, those of a bare backbone of its backbone.
      variables: the network's {"params", "batch_stats"}.

    Returns:
      The variables, in which the loaded arrays have the types of those that they replace; and one line that says what
      was taken and what starts anew.

    Raises:
      UserError: the weights cannot be had, or are not of this network.
    """
    names = method.names()
    before: dict[tuple[str, ...], Any] = flatten_dict({name: variables[name] for name in ("params", "batch_stats")})
    try:
        stored = settings_of_weights(init_from)
        _, loaded, left_out = read_weights(
            init_from,
            settings=None if stored else method.settings,
            drop_classifiers=True,
            advice="method and model of the settings say which network is expected",
        )
        taken = {path: array for path, array in flatten_dict(loaded).items() if path[0] in variables}
        is_bare = all(map(names.is_backbone, taken))
        if stored:
            fix = "set these fields as they are there, or name other weights"
            _check_same_network(stored, method.settings, init_from, fix, backbone_only=is_bare)
    except UserError as error:
        raise SettingsError(f"init_from: {error}") from error
    after = {path: jnp.asarray(taken[path], leaf.dtype) if path in taken else leaf for path, leaf in before.items()}
    return unflatten_dict(after), f"init_from: {init_from}: " + _taken_in_words(method, variables, is_bare, left_out)


def _taken_in_words(method: Method, variables: Mapping[str, Any], is_bare: bool, left_out: list[str]) -> str:
    names, params = method.names(), flatten_dict({"params": variables["params"]})
    anew = ["/".join(path[1:]) for path in params if names.is_classifier(names.name(path))]
    if is_bare:
        words = "the backbone is taken, everything else starts anew"
    elif anew:
        num_ids = number_of_ids(method, variables)
        words = f"everything is taken but the classifiers, which start anew for {num_ids} identities ({listed(anew)})"
    else:
        words = "everything is taken"
    others = [name for name in left_out if is_bare or not names.is_classifier(name)]
    others = [name for name in others if not re.fullmatch(COUNTERS, name)]
    return words + (f"; left out: {listed(others)}" if others else "")


def initial_variables(
    method: Method, num_ids: int, *, report: Callable[[str], None] = lambda line: None
) -> dict[str, Any]:
    """{params, batch_stats} before training: drawn from settings.seed, and what settings.init_from has, if set.

    `report` is told, in one line, what was taken from settings.init_from and what starts anew.

    Raises:
      UserError: settings.init_from cannot be had, or does not fit the network.
    """
    settings = method.settings
    key, _ = random_keys(settings.seed)
    variables = init_variables(method.network(num_ids), key, settings.data.height, settings.data.width)
    if settings.init_from:
        variables, line = start_from(settings.init_from, method, variables)
        report(line)
    return variables
