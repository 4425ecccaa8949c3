"""The paper's recipe as a config: `MPANetSettings()` says every field, once, with its default, meaning and rule.

Any scalar can be set on the command line: `--config=configs/sysu.py --config.optim.learning_rate=1e-3`.
"""

from ml_collections import ConfigDict

from mpanet_jax.datasets import own_fields
from mpanet_jax.methods.mpanet import MPANetSettings
from mpanet_jax.settings import to_dict


def get_config() -> ConfigDict:
    config = ConfigDict(to_dict(MPANetSettings()))
    # What only one data set has, such as RegDB's trial, at its default; `--config` knows the fields of all.
    for name, dataset in own_fields().items():
        config.dataset[name] = getattr(dataset.settings_class(), name)
    return config


def apply_preset(config: ConfigDict, preset: str) -> ConfigDict:
    """Sets the fields in which the published program differs from the paper (`official`); `paper` changes nothing.

    The program also kept the best model on the test set, from evaluations every 5 epochs. That is left to the user:
    --config.eval.best=rank1 --config.train.eval_every_epochs=5
    """
    if preset not in ("", "paper", "official"):
        raise ValueError(f"unknown preset '{preset}' after the config's file name: expected 'paper' or 'official'")
    config.preset = preset or "paper"
    if preset == "official":
        config.augment.crop_padding = 10
        config.loss.modality_identity = 1.0  # the term is added twice with weight 0.5
        config.loss.per_modality_identity = False
        config.loss.student_first = True
        config.mean.epochs_at_full = 100
    return config
