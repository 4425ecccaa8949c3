"""LLCM, with the recipe for SYSU-MM01 (the paper has no figures on LLCM).

python scripts/train.py --config=configs/llcm.py --config.dataset.source=/path/to/LLCM
"""

from ml_collections import ConfigDict

from configs.default import apply_preset
from configs.default import get_config as default_config


def get_config(preset: str = "paper") -> ConfigDict:
    config = default_config()
    config.dataset.name = "llcm"
    apply_preset(config, preset)
    if preset == "strong":
        config.augment.grey_probability = 0.5  # as RLE does on LLCM
    return config
