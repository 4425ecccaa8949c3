"""The settings of a run: frozen dataclasses whose fields say their type, default, meaning and rule.

Here are the fields that all methods share. What a method adds lies in its own file, as a subclass of `Settings` whose
defaults are its recipe (`methods/mpanet.py`: the paper's, on SYSU-MM01). Scripts read a config file (ml_collections)
into these classes, and below them nothing knows of configs.

    settings = MPANetSettings(data=DataSettings(height=288, width=144))
    settings = settings.replace({"seed": 1, "dataset.name": "regdb", "dataset.trial": 3})
"""

import dataclasses
import difflib
import functools
import math
import sys
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

from mpanet_jax.errors import SettingsError


class Rule(NamedTuple):
    """What a value has to be, in words and as a test."""

    expected: str
    holds: Callable[[Any], bool]


def setting(default: Any, comment: str, rule: Rule | Callable[[], Iterable[str]] | None = None) -> Any:
    """A field with its meaning and its rule; a function as the rule gives the names that are allowed."""
    return dataclasses.field(default=default, metadata={"comment": comment, "rule": rule})


def start_setting(default: str) -> Any:
    """The field `init_from`, of which each method's recipe has its own default."""
    return setting(
        default,
        "weights of a backbone or of a whole network: a .safetensors or .pth file, 'hf:owner/repository' or a workdir; "
        "'': random",
    )


def group(cls: type, **defaults: Any) -> Any:
    """A field that is a group of settings at their defaults, some of which may be others than the class has."""
    return dataclasses.field(default_factory=functools.partial(cls, **defaults))


def at_least(least: float) -> Rule:
    """A finite number that is not below `least`."""
    return Rule(f"at least {least}", lambda value: least <= value < math.inf)


def between(least: float, most: float) -> Rule:
    """A number of a closed range."""
    return Rule(f"a number from {least} to {most}", lambda value: least <= value <= most)


def one_of(*names: str) -> Callable[[], Iterable[str]]:
    """One of some names."""
    return lambda: names


IMAGENET = "hf:timm/resnet50.tv_in1k"  # torchvision's ResNet-50
POSITIVE = Rule("a positive number", lambda value: 0 < value < math.inf)
MOST_EPOCHS = 100_000
RISING = Rule(
    f"epochs from 0 to {MOST_EPOCHS}, in rising order",
    lambda epochs: list(epochs) == sorted(set(epochs)) and all(0 <= epoch <= MOST_EPOCHS for epoch in epochs),
)
SHARE_RANGE = Rule("a smallest and a largest value, above 0 and at most 1", lambda pair: 0 < pair[0] <= pair[1] <= 1)
POSITIVE_RANGE = Rule("a smallest and a largest value above 0", lambda pair: 0 < pair[0] <= pair[1] < math.inf)


def _backbones() -> Mapping[str, Any]:
    from mpanet_jax.models.resnet import BACKBONES  # imports flax, which not every reader of settings needs

    return BACKBONES


def _datasets() -> Mapping[str, Any]:
    from mpanet_jax.datasets.registry import DATASETS  # imports this module

    return DATASETS


@dataclass(frozen=True)
class DatasetSettings:
    """Which data, and where they lie; a data set's own fields lie in its file, as a subclass."""

    name: str = setting("sysu_mm01", "the data set", _datasets)
    source: str = setting("", "the raw folder; needed once, to prepare")
    data_dir: str = setting("data", "where prepared data sets and caches live")
    validation: bool = setting(
        False, "hold the identities of the list 'val' out of training, and evaluate on them during training"
    )
    trial: ClassVar[int | None] = None  # which of several splits; a field where a data set has them

    def check(self) -> Iterator[tuple[str, str]]:
        """The data set's own class of settings, and what it can do."""
        dataset = _datasets()[self.name]
        if not isinstance(self, dataset.settings_class):
            yield "name", f"its settings are a {dataset.settings_class.__name__}"
        if self.validation and not dataset.has_validation:
            yield "validation", f"{self.name} has no list 'val'; leave it out"


@dataclass(frozen=True)
class DataSettings:
    """Images and batches."""

    # The upper bounds, here and below, are far above any use: values beyond them are slips, and would fail late.
    height: int = setting(384, "pixels after the resize", between(4, 4096))
    width: int = setting(128, "pixels after the resize", between(4, 4096))
    num_ids_per_batch: int = setting(16, "P", between(1, 4096))
    images_per_id: int = setting(8, "K, half visible, half infrared", between(2, 256))
    resize: str = setting("bilinear", "the filter of the resize, Pillow's", one_of("bilinear", "lanczos"))
    cache: str = setting(
        "auto",
        "resized images in 'device' memory, 'host' memory map, 'none', or what fits: 'auto'",
        one_of("auto", "device", "host", "none"),
    )
    num_workers: int = setting(
        -1,
        "processes that decode when nothing is cached; 0: threads of this one; -1: chosen",
        Rule("a number of processes up to 1024, 0 for threads, or -1 to choose", lambda value: -1 <= value <= 1024),
    )

    def check(self) -> Iterator[tuple[str, str]]:
        """K's halves."""
        if self.images_per_id % 2:
            even = self.images_per_id - 1
            yield "images_per_id", f"K is half visible, half infrared; use an even number such as {even}"


@dataclass(frozen=True)
class AugmentSettings:
    """What is drawn for a training image, in this order; a probability or padding of 0 leaves an operation out."""

    flip_probability: float = setting(0.5, "of the horizontal flip", between(0, 1))
    crop_padding: int = setting(0, "pixels added on every side before a random crop back; 0: no crop", between(0, 4096))
    crop_fill: int = setting(127, "the padding's value", Rule("a pixel's value, 0 to 255", lambda v: 0 <= v <= 255))
    exchange_probability: float = setting(0.0, "of one channel, drawn at random, in place of all", between(0, 1))
    grey_probability: float = setting(0.0, "of grey, where no channel was exchanged", between(0, 1))
    mrle_probability: float = setting(0.0, "of a random mix of the channels in place of all (RLE)", between(0, 1))
    mrle_beta: float = setting(0.3, "β of the Beta(β, β) that the mix is drawn from", POSITIVE)
    rrle_probability: float = setting(0.0, "of random factors in random rectangles (RLE)", between(0, 1))
    rrle_beta: float = setting(0.4, "β of the Beta(β, β) that the factors are drawn from", POSITIVE)
    rrle_area: tuple[float, float] = setting((0.02, 0.4), "as erase_area, of a rectangle", SHARE_RANGE)
    rrle_aspect: tuple[float, float] = setting((0.3, 1 / 0.3), "as erase_aspect, drawn uniformly", POSITIVE_RANGE)
    erase_probability: float = setting(0.5, "of random erasing", between(0, 1))
    erase_area: tuple[float, float] = setting((0.02, 0.33), "least and greatest share of the image", SHARE_RANGE)
    erase_aspect: tuple[float, float] = setting((0.3, 3.3), "least and greatest height / width", POSITIVE_RANGE)
    erase_log_aspect: bool = setting(True, "the aspect is drawn log-uniformly; False: uniformly")
    erase_attempts: int = setting(10, "rectangles until one is smaller than the image", between(1, 10_000))
    erase_fill: tuple[float, float, float] = setting(
        (0.0, 0.0, 0.0),
        "the channels' values in the rectangle, after normalisation",
        Rule("finite numbers", lambda values: all(map(math.isfinite, values))),
    )


@dataclass(frozen=True)
class ModelSettings:
    """The backbone; a method's modules are fields of its subclass."""

    backbone: str = setting("resnet50", "a name of torchvision's", _backbones)
    stage_sizes: tuple[int, ...] = setting(
        (),
        "blocks of the four stages; (): as the backbone has them",
        Rule(
            "4 numbers from 1 to 200, or none",
            lambda sizes: not sizes or (len(sizes) == 4 and min(sizes) >= 1 and max(sizes) <= 200),
        ),
    )
    width: int = setting(64, "channels of the stem", between(1, 1024))
    fused: str = setting(
        "auto",
        "the fast form of the layers: 'on', 'off', or where it was measured to be faster: 'auto'",
        one_of("auto", "on", "off"),
    )

    def __post_init__(self):
        if self.stage_sizes and self.stage_sizes == getattr(_backbones().get(self.backbone), "stage_sizes", None):
            object.__setattr__(self, "stage_sizes", ())  # written out or not, it is the same run


@dataclass(frozen=True)
class OptimSettings:
    """The optimiser and its schedule."""

    learning_rate: float = setting(3.5e-4, "in the first epochs", POSITIVE)
    milestones: tuple[int, ...] = setting((80, 120), "epochs after which the rate is multiplied by `decay`", RISING)
    decay: float = setting(0.1, "factor at each milestone", POSITIVE)
    weight_decay: float = setting(5e-4, "L2, added to the gradient", at_least(0))


@dataclass(frozen=True)
class TrainSettings:
    """The length of a run and what it writes."""

    num_epochs: int = setting(140, "of the whole run", between(1, MOST_EPOCHS))
    eval_every_epochs: int = setting(20, "0: only at the end", at_least(0))
    checkpoint_every_epochs: int = setting(5, "0: only at the end", at_least(0))
    keep_checkpoints: int = setting(2, "the last ones", at_least(1))
    log_every_steps: int = setting(50, "for TensorBoard and the terminal", at_least(1))
    # 15 divide five epochs of SYSU-MM01, so there one program does for the whole run.
    steps_per_call: int = setting(
        15, "steps sent to the device as one program, at most, where it holds the images (else 1)", at_least(1)
    )
    on_nonfinite: str = setting(
        "stop",
        "when loss, weights or moments are no numbers: 'stop', or 'skip' the step, up to 10 in a row",
        one_of("stop", "skip"),
    )


@dataclass(frozen=True)
class EvalSettings:
    """Evaluation, during training and after it."""

    batch_size: int = setting(256, "images at once", between(1, 65536))
    best: str = setting(
        "",
        "'rank1', 'mAP', …: also keep the checkpoint that is best on the *test set*; '': don't",
        one_of("", "rank1", "rank5", "rank10", "rank20", "mAP", "mINP"),
    )
    flip: bool = setting(
        False, "an embedding is the mean of those of the image and its mirror image, L2-normalised before and after"
    )
    rerank: bool = setting(False, "k-reciprocal re-ranking; not part of any published MPANet figure")


@dataclass(frozen=True)
class Settings:
    """What every method's run is made from.

    Raises `SettingsError` when it is made with a value of another type, out of range, or that fits no other.
    """

    seed: int = setting(0, "of initialisation, plan and augmentation", between(0, 2**32 - 1))
    preset: str = setting(
        "paper", "only recorded: what the config file made of it", one_of("paper", "official", "strong")
    )
    method: str = setting("mpanet", "which method the other fields are of")
    dtype: str = setting(
        "auto",
        "of convolutions and matrix products; auto: bfloat16 on accelerators, float32 on CPU",
        one_of("auto", "float32", "bfloat16", "float64"),
    )
    parallel: str = setting("pmap", "how several devices share a step; the same numbers", one_of("pmap", "shard_map"))
    batch_scale: str = setting(
        "global",
        "data.num_ids_per_batch is of the whole batch; 'per_device': of each device's share",
        one_of("global", "per_device"),
    )
    init_from: str = start_setting("")

    dataset: DatasetSettings = group(DatasetSettings)
    data: DataSettings = group(DataSettings)
    augment: AugmentSettings = group(AugmentSettings)
    model: ModelSettings = group(ModelSettings)
    optim: OptimSettings = group(OptimSettings)
    train: TrainSettings = group(TrainSettings)
    eval: EvalSettings = group(EvalSettings)

    def __post_init__(self):
        check(self)

    def replace(self, changes: Mapping[str, Any]) -> "Settings":
        """These settings with some fields changed: `settings.replace({"data.height": 288, "seed": 1})`.

        Another `method` or `dataset.name` brings the fields and the defaults of that method or data set; what was
        changed before stays.

        Raises:
          SettingsError: no such field, or a value that cannot be.
        """
        from mpanet_jax.methods import settings_of  # imports this module

        plain = {name: to_dict(value) if dataclasses.is_dataclass(value) else value for name, value in changes.items()}
        default = flat(to_dict(type(self)()))
        kept = {
            name: value
            for name, value in flat(to_dict(self)).items()
            if default.get(name) != value and not dataclasses.is_dataclass(changes.get(name.partition(".")[0]))
        }
        return settings_of(_nested({"method": self.method} | kept | flat(plain)))


def check(settings: Any, prefix: str = "") -> None:
    """Raise `SettingsError` for the first field, of the settings or of a group, that cannot be as it is."""
    for path, message in _faults(settings, prefix):
        raise SettingsError(f"{path} {message}")


def _faults(settings: Any, prefix: str) -> Iterator[tuple[str, str]]:
    """(path, "= value: what is expected") of every field that cannot be as it is."""
    hints = typing.get_type_hints(type(settings))
    for field in dataclasses.fields(settings):
        value, path, rule = getattr(settings, field.name), prefix + field.name, field.metadata.get("rule")
        if not _is_a(value, hints[field.name]):
            yield path, f"= {value!r}: expected {_type_name(hints[field.name])}"
        elif dataclasses.is_dataclass(value):
            yield from _faults(value, path + ".")
        elif isinstance(rule, Rule):
            if not rule.holds(value):
                yield path, f"= {value!r}: expected {rule.expected}"
        elif rule is not None and value not in (names := tuple(rule())):
            yield path, expected_one_of(value, names)
    for name, message in settings.check() if hasattr(settings, "check") else ():
        value = settings
        for part in name.split("."):
            value = getattr(value, part)
        yield prefix + name, f"= {value!r}: {message}"


def expected_one_of(value: Any, names: Iterable[str]) -> str:
    """What an error says, behind the field's path, of a value that is none of some names."""
    names = list(names)
    return f"= {value!r}: expected one of {', '.join(map(repr, names))}{_nearest(str(value), names)}"


def _nearest(name: str, names: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(names), 1)
    return f"; did you mean {close[0]!r}?" if close else ""


def _is_a(value: Any, hint: Any) -> bool:
    if typing.get_origin(hint) is tuple:
        inner = typing.get_args(hint)
        if not isinstance(value, tuple):
            return False
        if inner[-1] is Ellipsis:
            return all(_is_a(v, inner[0]) for v in value)
        return len(value) == len(inner) and all(map(_is_a, value, inner))
    if hint is float:
        if isinstance(value, float):
            return not math.isnan(value)
        return _is_a(value, int) and abs(value) <= sys.float_info.max  # Python's whole numbers have no end
    return isinstance(value, hint) and (hint is bool or not isinstance(value, bool))


def _type_name(hint: Any) -> str:
    names = {int: "a whole number", float: "a number", bool: "True or False", str: "a text"}
    if typing.get_origin(hint) is tuple:
        inner = typing.get_args(hint)
        numbers = "whole numbers" if inner[0] is int else "numbers"
        return f"a tuple of {numbers}" if inner[-1] is Ellipsis else f"{len(inner)} {numbers}"
    return names.get(hint, f"a {getattr(hint, '__name__', hint)}")


def to_dict(settings: Any) -> dict[str, Any]:
    """The settings as nested dicts of plain values."""
    return dataclasses.asdict(settings)


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dicts as one: {"data.height": 384, …}."""
    leaves = {}
    for name, value in tree.items():
        leaves |= flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {prefix + name: value}
    return leaves


def _nested(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `flat`."""
    tree: dict[str, Any] = {}
    for path, value in leaves.items():
        *groups, name = path.split(".")
        branch = tree
        for group_name in groups:
            branch = branch.setdefault(group_name, {})
            if not isinstance(branch, dict):
                raise unknown_field(path, leaves)
        branch[name] = value
    return tree


def differences(settings: Any, other: Any) -> dict[str, tuple[Any, Any]]:
    """{"data.height": (384, 288), …}: the fields that differ, with both values; None where a field is missing."""
    ours, theirs = flat(to_dict(settings)), flat(to_dict(other))
    pairs = {name: (ours.get(name), theirs.get(name)) for name in ours | theirs}
    return {name: (one, two) for name, (one, two) in pairs.items() if one != two}


def from_dict(cls: type[Any], tree: Mapping[str, Any], prefix: str = "") -> Any:
    """The settings of class `cls` that a tree of plain values describes; what the tree lacks is at its default.

    Raises:
      SettingsError: the tree has a field that the class lacks, or a value that cannot be.
    """
    fields = {field.name: field for field in dataclasses.fields(cls)}
    values = {}
    for name, value in tree.items():
        if name not in fields:
            raise unknown_field(prefix + name, [prefix + field for field in fields])
        factory = fields[name].default_factory
        if isinstance(value, Mapping) and factory is not dataclasses.MISSING:
            default = factory()
            value = from_dict(type(default), {**to_dict(default), **value}, f"{prefix}{name}.")
        values[name] = tuple(value) if isinstance(value, list) else value
    return cls(**values)


def unknown_field(path: str, known: Iterable[str]) -> SettingsError:
    """The error for a field that there isn't."""
    known = list(known)
    return SettingsError(f"{path}: unknown field; there are {', '.join(known)}{_nearest(path, known)}")


def replace(settings: Any, changes: Mapping[str, Any], prefix: str = "") -> Any:
    """The settings with some fields changed: `replace(settings, {"data.height": 288, "seed": 1})`.

    Raises:
      SettingsError: no such field, or a value that cannot be.
    """
    by_field: dict[str, dict[str, Any]] = {}
    for path, value in changes.items():
        name, _, rest = path.partition(".")
        by_field.setdefault(name, {})[rest] = value
    values = {}
    for name, inner in by_field.items():
        if name not in (known := [field.name for field in dataclasses.fields(settings)]):
            raise unknown_field(prefix + name, [prefix + field for field in known])
        value = inner.pop("", getattr(settings, name))
        if inner and not dataclasses.is_dataclass(value):
            raise unknown_field(f"{prefix}{name}.{next(iter(inner))}", [prefix + field for field in known])
        values[name] = replace(value, inner, f"{prefix}{name}.") if inner else value
    return dataclasses.replace(settings, **values)
