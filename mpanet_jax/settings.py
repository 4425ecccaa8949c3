"""The settings of a run: frozen dataclasses whose fields say their type, default, meaning and rule.

These are the fields that all methods share. A method adds its own in its file, in a subclass of `Settings` whose
defaults are the method's recipe (`methods/mpanet.py`: the paper's, on SYSU-MM01). Scripts turn a config file
(ml_collections) into these classes; the rest of the package does not know configs.

    settings = MPANetSettings(data=DataSettings(height=288, width=144))
    settings = settings.replace({"seed": 1, "dataset.name": "regdb", "dataset.trial": 3})

`settings_base.py` has the functions that declare, check, compare and change settings.
"""

import dataclasses
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from mpanet_jax.settings_base import Rule, at_least, between, check, flat, group, nested, one_of, setting, to_dict


def start_setting(default: str) -> Any:
    """The field `init_from`; each method's recipe gives it its own default."""
    return setting(
        default,
        "weights of a backbone or of a whole network: a .safetensors or .pth file, 'hf:owner/repository' or a workdir; "
        "'': random",
    )


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
    """Which data set, and where it is; a data set adds its own fields in its file, in a subclass."""

    name: str = setting("sysu_mm01", "the data set", _datasets)
    source: str = setting("", "the raw folder; needed once, to prepare the data set")
    data_dir: str = setting("data", "the folder of prepared data sets and caches")
    validation: bool = setting(
        False, "hold the identities of the list 'val' out of training, and evaluate on them during training"
    )
    trial: ClassVar[int | None] = None  # which of a data set's splits; a field in the subclass of a set with several

    def check(self) -> Iterator[tuple[str, str]]:
        """(field, fault) where this is not the data set's own class, or it has no validation list; see `check`."""
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
        "where resized images are kept: in 'device' memory, in a 'host' memory map, or not ('none'); 'auto': what fits",
        one_of("auto", "device", "host", "none"),
    )
    resize_on: str = setting(
        "auto",
        "who resizes images that are not kept resized: the 'host', or the 'device', to the same pixels; 'auto': a GPU",
        one_of("auto", "device", "host"),
    )
    num_workers: int = setting(
        -1,
        "processes that decode if there is no cache, or for a long evaluation; 0: threads; -1: chosen for the machine",
        Rule("a number of processes up to 1024, 0 for threads, or -1 to choose", lambda value: -1 <= value <= 1024),
    )

    def check(self) -> Iterator[tuple[str, str]]:
        """(field, fault) where K is odd; see `check`."""
        if self.images_per_id % 2:
            even = self.images_per_id - 1
            yield "images_per_id", f"K is half visible, half infrared; use an even number such as {even}"


@dataclass(frozen=True)
class AugmentSettings:
    """The augmentation of a training image, in this order; a probability or padding of 0 leaves an operation out."""

    flip_probability: float = setting(0.5, "of the horizontal flip", between(0, 1))
    crop_padding: int = setting(0, "pixels added on every side before a random crop back; 0: no crop", between(0, 4096))
    crop_fill: int = setting(127, "the padding's value", Rule("a pixel's value, 0 to 255", lambda v: 0 <= v <= 255))
    exchange_probability: float = setting(0.0, "of replacing all channels by one, drawn at random", between(0, 1))
    grey_probability: float = setting(0.0, "of grey, if no channel was exchanged", between(0, 1))
    mrle_probability: float = setting(0.0, "of replacing all channels by a random mix of them (RLE)", between(0, 1))
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
        "the fast form of the layers: 'on', 'off', or 'auto': where it was measured to be faster",
        one_of("auto", "on", "off"),
    )

    def __post_init__(self):
        if self.stage_sizes and self.stage_sizes == getattr(_backbones().get(self.backbone), "stage_sizes", None):
            object.__setattr__(self, "stage_sizes", ())  # the backbone's own sizes, written out: the same run


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
    keep_checkpoints: int = setting(2, "how many of the last ones", at_least(1))
    log_every_steps: int = setting(50, "for TensorBoard and the terminal", at_least(1))
    # 15 divides the 915 steps of five epochs of SYSU-MM01, so there one program is enough for the whole run.
    steps_per_call: int = setting(
        15, "the most steps in one program; where the device does not hold the images, fewer", at_least(1)
    )
    on_nonfinite: str = setting(
        "stop",
        "if loss, weights or moments are not finite: 'stop', or 'skip' the step, fewer than 10 in a row",
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
    """The settings that every method has.

    Raises:
      SettingsError: a value has the wrong type, is out of range, or contradicts another field; the message names the
        field.
    """

    seed: int = setting(0, "of initialisation, plan and augmentation", between(0, 2**32 - 1))
    preset: str = setting("paper", "the config file's preset; only recorded", one_of("paper", "official", "strong"))
    method: str = setting("mpanet", "which method the other fields are of")
    dtype: str = setting(
        "auto",
        "of convolutions and matrix products; 'auto': bfloat16 on accelerators, float32 on CPUs",
        one_of("auto", "float32", "bfloat16", "float64"),
    )
    parallel: str = setting(
        "pmap", "how a step is mapped over several devices; the numbers are the same", one_of("pmap", "shard_map")
    )
    batch_scale: str = setting(
        "global",
        "'global': data.num_ids_per_batch is of the whole batch; 'per_device': of each device's share",
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
        """A copy of the settings with some fields changed: `settings.replace({"data.height": 288, "seed": 1})`.

        A new `method` or `dataset.name` brings the fields and the defaults of that method or data set; fields that
        differ from their defaults keep their values.

        Args:
          changes: {field's path: value}; the value of a group may be a dataclass.

        Raises:
          SettingsError: there is no such field, or it refuses the value.
        """
        from mpanet_jax.methods import settings_of  # imports this module

        plain = {name: to_dict(value) if dataclasses.is_dataclass(value) else value for name, value in changes.items()}
        default = flat(to_dict(type(self)()))
        kept = {
            name: value
            for name, value in flat(to_dict(self)).items()
            if default.get(name) != value and not dataclasses.is_dataclass(changes.get(name.partition(".")[0]))
        }
        return settings_of(nested({"method": self.method} | kept | flat(plain)))
