"""RegDB. Rank-1 / mAP over the ten trials: infrared→visible 82.8 / 80.7, visible→infrared 83.7 / 80.9.

python scripts/train.py --config=configs/regdb.py:split=3 --config.dataset.source=/path/to/RegDB
`split=N` chooses the trial, 1 to 10. `:official` or `:split=3,official` follows the published program; `strong` adds
RLE's augmentations to that.
"""

from ml_collections import ConfigDict

from configs.default import apply_preset
from configs.default import get_config as default_config


def get_config(options: str = "") -> ConfigDict:
    config = default_config()
    preset = take_split(config, options) or "paper"
    apply_preset(config, preset)
    if preset in ("official", "strong"):
        config.data.height, config.data.width = 256, 128
        config.data.num_ids_per_batch, config.data.images_per_id = 12, 10
        config.optim.milestones = (110,)
    if preset == "strong":
        config.augment.grey_probability = 0.5  # as RLE does on RegDB
    return config


def take_split(config: ConfigDict, options: str) -> str:
    """Sets RegDB as the data set and, if `split=N` is among the options, its trial; returns the other option, or ''.

    Raises:
      ValueError: N is no trial from 1 to 10.
    """
    config.dataset.name = "regdb"
    other = ""
    for option in filter(None, options.split(",")):
        name, _, value = option.partition("=")
        if name == "split":
            if not value.isdigit() or not 1 <= int(value) <= 10:
                raise ValueError(f"config option 'split={value}': expected a trial from 1 to 10")
            config.dataset.trial = int(value)
        else:
            other = option
    return other
