"""SYSU-MM01, the paper's recipe: 140 epochs, P = 16, K = 8, 384×128. Rank-1 / mAP, all-search: 70.58 / 68.24.

python scripts/train.py --config=configs/sysu.py --config.dataset.source=/path/to/SYSU-MM01
`--config=configs/sysu.py:official` follows the published program instead of the paper. `:strong` adds RLE's
augmentations to that; nobody has measured it on SYSU-MM01 here.
"""

from ml_collections import ConfigDict

from configs.default import apply_preset
from configs.default import get_config as default_config


def get_config(preset: str = "paper") -> ConfigDict:
    config = default_config()
    return apply_preset(config, preset)
