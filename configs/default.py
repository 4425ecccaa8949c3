"""The paper's recipe as a config: `MPANetSettings()` says every field, once, with its default, meaning and rule.

Any scalar can be set on the command line: `--config=configs/sysu.py --config.optim.learning_rate=1e-3`.
"""

from ml_collections import ConfigDict

from mpanet_jax.datasets import own_fields
from mpanet_jax.methods.mpanet import MPANetSettings
from mpanet_jax.settings import Settings, to_dict


def config_of(settings: Settings) -> ConfigDict:
    """The settings of a method as a config."""
    config = ConfigDict(to_dict(settings))
    # What only one data set has, such as RegDB's trial, at its default; `--config` knows the fields of all.
    for name, dataset in own_fields().items():
        config.dataset[name] = getattr(dataset.settings_class(), name)
    return config


def get_config() -> ConfigDict:
    return config_of(MPANetSettings())


def apply_preset(config: ConfigDict, preset: str) -> ConfigDict:
    """Sets the fields in which a recipe differs from the paper's; `paper` changes nothing.

    `official`: the published program. It also kept the best model on the test set, from evaluations every 5 epochs.
    That is left to the user: --config.eval.best=rank1 --config.train.eval_every_epochs=5
    `strong`: `official` with the augmentations of RLE (Tan et al., NeurIPS 2024), its erasing among them.
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
        # RLE fills with these before it normalises.
        filled = zip((0.4914, 0.4822, 0.4465), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), strict=True)
        config.augment.erase_fill = tuple((value - mean) / deviation for value, mean, deviation in filled)
    return config
