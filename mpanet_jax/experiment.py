"""A config turned into the objects it describes. Below this file nothing reads a config."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from mpanet_jax import datasets, weights
from mpanet_jax.data.augment import AugmentSettings
from mpanet_jax.data.cache import CACHE_MODES
from mpanet_jax.datasets.schema import Split
from mpanet_jax.errors import UserError
from mpanet_jax.losses import LossSettings
from mpanet_jax.models.mpanet import CHANNEL_MODULES, PATTERN_MODULES, MPANet
from mpanet_jax.optim import create_optimizer, learning_rate_schedule, mean_rate_schedule
from mpanet_jax.state import init_variables

CONFIG_FILE = "config.json"
# Fields, and groups of them, that a resumed run may change: its length, its reports, and what alters no number of it.
FREE_TO_CHANGE = (
    *("train.", "eval.", "parallel", "init_from"),
    *("data.cache", "data.num_workers", "dataset.source", "dataset.data_dir"),
)


def set_compilation_cache(folder: str | None) -> None:
    """Keeps compiled programs in `folder`; None or '' compiles everything anew. To be called before the first one."""
    jax.config.update("jax_compilation_cache_dir", str(Path(folder).expanduser()) if folder else None)
    # The small ones too: dozens of them are compiled before the first step.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)


def check_config(config: ConfigDict) -> None:
    """Refuses a config that cannot be run, before anything is written.

    Raises:
      UserError: naming the field, what it expects and what it got.
    """
    choices = {
        "preset": ("paper", "official"),
        "parallel": ("pmap", "shard_map"),
        "batch_scale": ("global", "per_device"),
        "dtype": ("auto", "float32", "bfloat16", "float64"),
        "dataset.name": tuple(datasets.BUILDERS),
        "data.cache": ("auto", *CACHE_MODES),
        "eval.best": ("", "rank1", "rank5", "rank10", "rank20", "mAP", "mINP"),
        "model.channel_module": CHANNEL_MODULES,
        "model.pattern_module": PATTERN_MODULES,
    }
    for field, allowed in choices.items():
        value = _field(config, field)
        if value not in allowed:
            raise UserError(f"config.{field} = '{value}': expected one of {', '.join(map(repr, allowed))}")
    official = (not config.loss.per_modality_identity, config.loss.student_first, config.mean.epochs_at_full)
    if config.preset == "official" and not any(official):
        # The field is a record of what apply_preset did; setting it alone would leave the paper's recipe.
        raise UserError(
            "config.preset = 'official': the other fields are still the paper's; the preset is chosen behind the "
            "config file's name: --config=configs/NAME.py:official"
        )
    if config.data.images_per_id < 2 or config.data.images_per_id % 2:
        raise UserError(
            f"config.data.images_per_id = {config.data.images_per_id}: K is half visible, half infrared; "
            f"use an even number such as {max(2, config.data.images_per_id // 2 * 2)}"
        )
    _require(
        config,
        "data.height data.width data.num_ids_per_batch train.num_epochs train.keep_checkpoints train.log_every_steps "
        "train.steps_per_call eval.batch_size model.width model.num_patterns model.reduction",
        lambda value: value >= 1,
        "at least 1",
    )
    _require(
        config,
        "data.num_workers",
        lambda value: value >= -1,
        "a number of processes, 0 for threads, or -1 to choose",
    )
    _require(
        config,
        "seed augment.crop_padding train.eval_every_epochs train.checkpoint_every_epochs optim.weight_decay "
        "mean.epochs_at_full loss.identity loss.center_cluster loss.separation loss.modality_identity loss.mutual_mean "
        "loss.margin",
        lambda value: 0 <= value < math.inf,
        "at least 0",
    )
    _require(config, "optim.learning_rate optim.decay", lambda value: 0 < value < math.inf, "a positive number")
    _require(
        config,
        "augment.flip_probability augment.erase_probability mean.rate",
        lambda value: 0 <= value <= 1,
        "a number from 0 to 1",
    )
    _require(config, "augment.crop_fill", lambda value: 0 <= value <= 255, "a pixel's value, 0 to 255")
    _require(config, "optim.milestones", lambda e: list(e) == sorted(set(e)), "epochs in rising order")
    _require(config, "model.stage_sizes", lambda sizes: len(sizes) == 4, "4 numbers")
    _require(config, "model.stage_sizes", lambda sizes: min(sizes) >= 1, "at least one block a stage")
    _require(config, "augment.erase_area augment.erase_aspect", lambda pair: len(pair) == 2, "2 numbers")
    pair_of = "a smallest and a largest value"
    _require(config, "augment.erase_area", lambda pair: 0 < pair[0] <= pair[1] <= 1, pair_of)
    _require(config, "augment.erase_aspect", lambda pair: 0 < pair[0] <= pair[1], pair_of)
    if config.model.width % config.model.reduction and config.model.channel_module in ("mam", "se", "cbam"):
        raise UserError(
            f"config.model.reduction = {config.model.reduction}: it has to divide config.model.width = "
            f"{config.model.width}"
        )


def _require(config: ConfigDict, fields: str, holds: Callable[[Any], bool], expected: str) -> None:
    """Raises a `UserError` for the first of the fields whose value does not hold."""
    for field in fields.split():
        value = _field(config, field)
        if not holds(value):
            raise UserError(f"config.{field} = {value}: expected {expected}")


def _field(config: ConfigDict, path: str) -> object:
    for name in path.split("."):
        config = config[name]
    return config


def save_config(config: ConfigDict, workdir: Path) -> None:
    """Writes `config.json`, the record from which `evaluate` and `extract` rebuild the model."""
    workdir.mkdir(parents=True, exist_ok=True)
    unfinished = workdir / (CONFIG_FILE + ".tmp")
    unfinished.write_text(json.dumps(config.to_dict(), indent=2) + "\n")
    unfinished.rename(workdir / CONFIG_FILE)


def check_same_run(config: ConfigDict, workdir: Path) -> None:
    """Refuses to go on with a run in `workdir` by a config under which it would be another.

    Raises:
      UserError: names the fields that differ from the run's config.json and matter for its result.
    """
    if not (workdir / CONFIG_FILE).exists():
        return
    before, now = _flat(load_config(workdir).to_dict()), _flat(json.loads(json.dumps(config.to_dict())))
    differing = [
        f"config.{name} = {now[name]!r} ({before[name]!r} before)"
        for name in now
        if name in before and before[name] != now[name] and not name.startswith(FREE_TO_CHANGE)
    ]
    if differing:
        raise UserError(
            f"{workdir}: holds a run with another config, {', '.join(differing)}; "
            "give another --workdir, or set the fields back to go on with it"
        )


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for name, value in tree.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat


def load_config(workdir: Path) -> ConfigDict:
    """The config that `workdir` was trained with.

    Raises:
      UserError: the folder holds no readable config.json.
    """
    path = Path(workdir) / CONFIG_FILE
    try:
        config = json.loads(path.read_text())
        if not isinstance(config, dict) or not {"dataset", "model", "data"} <= set(config):
            raise ValueError("the sections dataset, model and data are not in it")
        return ConfigDict(config)
    except FileNotFoundError:
        raise UserError(f"{path}: not found; --workdir takes a folder that scripts/train.py has written") from None
    except ValueError as error:
        raise UserError(f"{path}: not a config ({error}); restore it or train again") from None


def compute_dtype(name: str) -> jnp.dtype:
    """config.dtype as a type; 'auto' is bfloat16 on accelerators and float32 on CPU."""
    if name == "auto":
        name = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    return jnp.dtype(name)


def load_split(config: ConfigDict, split: str) -> Split:
    """The config's data set, prepared on demand from config.dataset.source; `split` is 'train' or 'test'."""
    dataset = config.dataset
    datasets.prepare(dataset.name, dataset.source, dataset.data_dir, trial=dataset.trial, track=datasets.progress_bar)
    return datasets.load_split(dataset.name, dataset.data_dir, split, trial=dataset.trial)


def cache_dir(config: ConfigDict) -> Path:
    """Where the resized images of config.data.cache = 'host' lie."""
    return Path(config.dataset.data_dir) / "cache"


def make_model(config: ConfigDict, num_ids: int, axis_name: str | None = None) -> MPANet:
    """The network of config.model for `num_ids` identities."""
    dtype = compute_dtype(config.dtype)
    return MPANet(
        num_ids=num_ids,
        **{**config.model, "stage_sizes": tuple(config.model.stage_sizes)},
        dtype=dtype,
        param_dtype=jnp.promote_types(dtype, jnp.float32),
        axis_name=axis_name,
    )


def initial_variables(config: ConfigDict, num_ids: int) -> dict[str, Any]:
    """{params, batch_stats} before training: drawn from config.seed, the backbone from config.init_from if it is set.

    Raises:
      UserError: config.init_from cannot be had, or does not fit the model.
    """
    key, _ = random_keys(config)
    variables = init_variables(make_model(config, num_ids), key, config.data.height, config.data.width)
    if not config.init_from:
        return variables
    params, batch_stats = weights.load_backbone(config.init_from, variables["params"], variables["batch_stats"])
    return {"params": params, "batch_stats": batch_stats}


def random_keys(config: ConfigDict) -> tuple[jax.Array, jax.Array]:
    """The keys of initialisation and of the steps."""
    init_key, run_key = jax.random.split(jax.random.key(config.seed))
    return init_key, run_key


def make_schedules(config: ConfigDict, steps_per_epoch: int) -> tuple[optax.Schedule, optax.Schedule]:
    """The learning rate and the mean classifiers' α, by step."""
    learning_rate = learning_rate_schedule(
        config.optim.learning_rate, tuple(config.optim.milestones), config.optim.decay, steps_per_epoch
    )
    return learning_rate, mean_rate_schedule(config.mean.rate, config.mean.epochs_at_full or None, steps_per_epoch)


def make_optimizer(config: ConfigDict, learning_rate: optax.Schedule) -> optax.GradientTransformation:
    """Adam with config.optim's weight decay."""
    return create_optimizer(learning_rate, config.optim.weight_decay)


def make_loss_settings(config: ConfigDict) -> LossSettings:
    """config.loss as plain values."""
    return LossSettings(**config.loss)


def make_augment_settings(config: ConfigDict) -> AugmentSettings:
    """config.augment as plain values."""
    values = {name: tuple(v) if isinstance(v, list | tuple) else v for name, v in config.augment.items()}
    return AugmentSettings(**values)
