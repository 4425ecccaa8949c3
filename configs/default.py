"""The paper's recipe as a config, and what the other configs share.

`MPANetSettings()` holds every field once, with its default, meaning and rule. The command line sets any scalar:
`--config=configs/sysu.py --config.optim.learning_rate=1e-3`.
"""

from ml_collections import ConfigDict

from mpanet_jax.datasets import own_fields
from mpanet_jax.methods.mpanet import MPANetSettings
from mpanet_jax.settings import Settings
from mpanet_jax.settings_base import to_dict


def config_of(settings: Settings) -> ConfigDict:
    """The settings of a method as a config, with the own fields of every data set, so that `--config` knows them."""
    config = ConfigDict(to_dict(settings))
    # RegDB's trial, for example, at its default.
    for name, dataset in own_fields().items():
        config.dataset[name] = getattr(dataset.settings_class(), name)
    return config


def get_config() -> ConfigDict:
    return config_of(MPANetSettings())


def refuse_options(options: str) -> None:
    """Raises `ValueError` for options after the file's name, of a recipe that has none."""
    if options:
        raise ValueError(f"config option {options!r}: this recipe has none")


def apply_preset(config: ConfigDict, preset: str) -> ConfigDict:
    """Sets the fields in which a recipe of MPANet differs from the paper's, and returns the config.

    `paper` (or ''): none.
    `official`: the published program's. That program also kept the model that was best on the test set, evaluated every
      5 epochs; add --config.eval.best=rank1 --config.train.eval_every_epochs=5 for that.
    `strong`: `official` with the augmentations of RLE (Tan et al., NeurIPS 2024), which include another random erasing.

    Raises:
      ValueError: another name.
    """
    if preset not in ("", "paper", "official", "strong"):
        raise ValueError(
            f"unknown preset '{preset}' after the config's file name: expected 'paper', 'official' or 'strong'"
        )
    config.preset = preset or "paper"
    if preset in ("official", "strong"):
        config.augment.crop_padding = 10
        config.loss.modality_identity = 1.0  # the term is added twice with weight 0.5
        config.loss.per_modality_identity = False
        config.loss.student_first = True
        config.mean.epochs_at_full = 100
    if preset == "strong":
        config.augment.mrle_probability = config.augment.rrle_probability = 0.5
        config.augment.erase_area = (0.02, 0.4)
        config.augment.erase_aspect = (0.3, 1 / 0.3)
        config.augment.erase_log_aspect = False
        config.augment.erase_attempts = 100
        # RLE fills rectangles with these values before it normalises the image.
        filled = zip((0.4914, 0.4822, 0.4465), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), strict=True)
        config.augment.erase_fill = tuple((value - mean) / deviation for value, mean, deviation in filled)
    return config
