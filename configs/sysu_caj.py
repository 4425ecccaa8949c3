"""CAJ on SYSU-MM01. Published Rank-1 / mAP / mINP: 69.88 / 66.89 / 53.61 (all-search, single-shot).

python scripts/train.py --config=configs/sysu_caj.py --config.dataset.source=/path/to/SYSU-MM01
"""

from ml_collections import ConfigDict

from configs.default import config_of, refuse_options
from mpanet_jax.methods.caj import CAJSettings


def get_config(options: str = "") -> ConfigDict:
    refuse_options(options)
    return config_of(CAJSettings())
