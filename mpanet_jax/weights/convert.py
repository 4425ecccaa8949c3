"""Reads weights from anywhere, converts them, and initialises networks with them."""

import json
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
from mpanet_jax.checkpoint import latest_step, load_model
from mpanet_jax.errors import ArgumentError, SettingsError, UserError
from mpanet_jax.files import write_whole_folder
from mpanet_jax.methods import make_method, settings_of
from mpanet_jax.methods.method import Method
from mpanet_jax.settings import ModelSettings, Settings
from mpanet_jax.settings_base import differences, expected_one_of, to_dict
from mpanet_jax.state import init_variables, random_keys
from mpanet_jax.weights import files
from mpanet_jax.weights.files import comma_list
from mpanet_jax.weights.hub import resolve
from mpanet_jax.weights.names import COUNTERS, Variables, from_state_dict, to_state_dict

# The settings that define the backbone.
BACKBONE_FIELDS = {f"model.{field.name}" for field in fields(ModelSettings)} - {"model.fused"}


def template_of(method: Method, num_ids: int) -> Variables:
    """Shapes and types of the {"params", "batch_stats", "averages"} of a method's network for `num_ids` identities."""
    network, data = method.network(num_ids), method.settings.data
    # With the images' size of a run, so that a run that starts from weights traces its network once. And no key is
    # made: a GPU would do that only after it has got the run's images.
    key = jax.eval_shape(jax.random.key, 0)
    variables = jax.eval_shape(lambda key: init_variables(network, key, data.height, data.width), key)
    return {**variables, "averages": method.averaged(variables["params"])}


def settings_of_weights(source: str | Path) -> Settings | None:
    """The settings stored with weights, in a run's config.json or a .safetensors file's metadata; None without.

    Raises:
      UserError: the weights are not there, or the metadata are not settings.
    """
    path = resolve(str(source))
    if path.is_dir():
        return run_files.load_settings(path) if (path / run_files.CONFIG_FILE).exists() else None
    tree = files.read_metadata(path)
    try:
        return None if tree is None else settings_of(tree)
    except (UserError, TypeError, AttributeError) as error:
        raise UserError(f"{source}: its metadata are not a run's settings ({error})") from error


def metrics_of_weights(source: str | Path, checkpoint: str = "last") -> dict[str, Any] | None:
    """The figures stored with weights, in a file's metadata or beside a workdir's checkpoint of their step, or None."""
    path = resolve(str(source))
    if path.is_file():
        return files.read_metadata(path, files.METRICS_KEY)
    step = 0 if checkpoint == "untrained" else latest_step(path, checkpoint)
    try:
        metrics = json.loads((path / run_files.METRICS_FILES[checkpoint]).read_text())
        is_current = all(values["step"] == step for values in metrics.values())
    except (OSError, ValueError, TypeError, AttributeError, KeyError):
        return None  # there are none, or somebody wrote the file by hand
    return metrics if is_current else None


def read_weights(
    source: str | Path,
    *,
    settings: Settings | None = None,
    num_ids: int | None = None,
    drop_classifiers: bool = False,
    checkpoint: str = "last",
    advice: str = "",
) -> tuple[Settings, Variables, list[str]]:
    """Reads weights of any kind.

    Args:
      source: a file, `hf:owner/repository`, a workdir, or a folder that `convert` wrote.
      settings: of the network, for weights without settings of their own, such as the published program's; None stands
        for the paper's. Weights with settings keep theirs, and must be of the same network.
      num_ids: number of identities that the classifiers must have; None accepts what is there.
      drop_classifiers: leave out the classifiers and their averages.
      checkpoint: of a workdir: 'last', 'best' (kept with settings.eval.best), or 'untrained' for the network before its
        first step.
      advice: ends the error message if the weights do not fit the network.

    Returns:
      The settings, the variables, and the names that were left out, as in `from_state_dict`.

    Raises:
      UserError: the weights are not there, cannot be read, or are of another network.
      ArgumentError: an unknown `checkpoint`, or one other than 'last' of weights that are not a workdir.
    """
    if checkpoint not in run_files.METRICS_FILES:
        raise ArgumentError("checkpoint", expected_one_of(checkpoint, run_files.METRICS_FILES))
    path = resolve(str(source))
    if checkpoint != "last" and not path.is_dir():
        raise ArgumentError(
            "checkpoint",
            f"= {checkpoint!r}: only a run's workdir has checkpoints to choose from, not {source}; leave it out",
        )
    stored = settings_of_weights(source)
    if stored and settings:
        fix = "leave the settings out, because these weights have their own, or name other weights"
        _check_same_network(stored, settings, source, fix)
    elif not stored and not settings:
        advice = (
            "weights without settings are read as the paper's MPANet; for another network, "
            "pass its settings (scripts: --config=configs/NAME.py --config.model.…)"
        )
    settings = stored or settings or settings_of({})
    method = make_method(settings)
    names = method.names()
    if path.is_dir():
        if checkpoint == "untrained":
            variables = initial_variables(method, num_ids or 1)
            variables["averages"] = method.averaged(variables["params"])
        else:
            _, variables = load_model(path, checkpoint)
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
    """Raises an error, with both values of each setting, for weights of another method, backbone or modules."""
    differing = {
        name: values
        for name, values in differences(given, stored).items()
        if name in BACKBONE_FIELDS
        or (not backbone_only and (name == "method" or (name.startswith("model.") and name != "model.fused")))
    }
    if "method" in differing:  # other fields cannot be compared then
        differing = {"method": differing["method"]}
    if differing:
        both = ", ".join(f"{name} is {there!r} there and {here!r} here" for name, (here, there) in differing.items())
        raise UserError(f"{source}: its weights are of another network: {both}; {fix}")


def convert(source: str | Path, target: str | Path, **options: Any) -> list[str]:
    """Converts weights of any kind.

    Args:
      source: as for `read_weights`.
      target: the file or folder to write. A name ending in .safetensors, .pth, .pt or .bin becomes a state dict in the
        published names; any other becomes a folder with an orbax checkpoint and the settings, which can be evaluated
        and used like a workdir.
      options: `settings`, `num_ids`, `drop_classifiers` and `advice` of `read_weights`.

    Returns:
      The names that were left out.

    Raises:
      UserError: as in `read_weights`, or the target folder exists.
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
        raise UserError(f"{target}: exists already; choose a new folder, or a name ending in {suffixes}")
    settings, variables, left_out = read_weights(source, **options)
    with write_whole_folder(target) as folder:
        with ocp.training.Checkpointer(str((folder / "checkpoints").resolve())) as checkpointer:
            checkpointer.save_checkpointables(0, {"model": variables})
        run_files.save_settings(settings, folder)
    return left_out


def start_from(
    init_from: str, method: Method, num_ids: int | None = None
) -> Callable[[Mapping[str, Any]], tuple[dict[str, Any], str]]:
    """Reads trained weights, with which a network is to start.

    A bare backbone, such as ImageNet's, replaces the network's backbone. A whole network replaces everything except the
    classifiers. They are kept even if their number of identities is the same, because nothing in the weights says that
    the identities are.

    Args:
      init_from: `settings.init_from`: any source that `read_weights` reads.
      method: of the network. Weights with settings must agree with it: a whole network in method, backbone and modules,
        a bare backbone in the backbone.
      num_ids: number of training identities, if it is known; that saves a trace of the network.

    Returns:
      A function of the network's {"params", "batch_stats"}. It returns the variables, where loaded arrays have the
      types of those that they replace; and a line that says what was loaded and what starts from scratch.

    Raises:
      SettingsError: the weights are not there, cannot be read, or are of another network.
    """
    try:
        stored = settings_of_weights(init_from)
        _, loaded, left_out = read_weights(
            init_from,
            settings=None if stored else method.settings,
            num_ids=num_ids,
            drop_classifiers=True,
            advice="the settings method and model define the expected network",
        )
        taken = {path: array for path, array in flatten_dict(loaded).items() if path[0] != "averages"}
        is_bare = all(map(method.names().is_backbone, taken))
        if stored:
            fix = "set these fields to the values there, or name other weights"
            _check_same_network(stored, method.settings, init_from, fix, backbone_only=is_bare)
    except UserError as error:
        raise SettingsError(f"init_from: {error}") from error

    def put_into(variables: Mapping[str, Any]) -> tuple[dict[str, Any], str]:
        before: dict[tuple[str, ...], Any] = flatten_dict({name: variables[name] for name in ("params", "batch_stats")})
        after = {path: jnp.asarray(taken[path], leaf.dtype) if path in taken else leaf for path, leaf in before.items()}
        line = f"init_from: {init_from}: " + _describe_start(method, variables, is_bare, left_out)
        return unflatten_dict(after), line

    return put_into


def _describe_start(method: Method, variables: Mapping[str, Any], is_bare: bool, left_out: list[str]) -> str:
    names = method.names()
    params: dict[tuple[str, ...], Any] = flatten_dict({"params": variables["params"]})
    classifiers = {"/".join(path[1:]): leaf for path, leaf in params.items() if names.is_classifier(names.name(path))}
    if is_bare:
        words = "loaded the backbone; everything else starts from scratch"
    elif classifiers:
        num_ids = next(iter(classifiers.values())).shape[-1]
        words = (
            f"loaded everything but the classifiers, which start from scratch for {num_ids} identities "
            f"({comma_list(classifiers)})"
        )
    else:
        words = "loaded everything"
    others = [name for name in left_out if is_bare or not names.is_classifier(name)]
    others = [name for name in others if not re.fullmatch(COUNTERS, name)]
    return words + (f"; left out: {comma_list(others)}" if others else "")


def initial_variables(
    method: Method, num_ids: int, *, report: Callable[[str], None] = lambda line: None
) -> dict[str, Any]:
    """The network's variables before the first training step: random, from settings.seed, then settings.init_from's.

    Args:
      method: of the network, with its settings.
      num_ids: number of training identities.
      report: called with a line that says what was loaded from settings.init_from and what starts from scratch.

    Returns:
      {"params", "batch_stats"}.

    Raises:
      SettingsError: the weights of settings.init_from are not there, or do not fit the network.
    """
    return read_initial_variables(method, num_ids, report=report)()


def read_initial_variables(
    method: Method, num_ids: int, *, report: Callable[[str], None] = lambda line: None
) -> Callable[[], dict[str, Any]]:
    """Reads the weights of settings.init_from; returns what makes the `initial_variables`, with the same arguments.

    Raises:
      SettingsError: as `initial_variables`.
    """
    settings = method.settings
    put_into = start_from(settings.init_from, method, num_ids) if settings.init_from else None

    def draw() -> dict[str, Any]:
        key, _ = random_keys(settings.seed)
        variables = init_variables(method.network(num_ids), key, settings.data.height, settings.data.width)
        if put_into:
            variables, line = put_into(variables)
            report(line)
        return variables

    return draw
