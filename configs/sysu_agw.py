"""AGW on SYSU-MM01. Published Rank-1 / mAP / mINP: 47.50 / 47.65 / 35.30 (all-search, single-shot).

python scripts/train.py --config=configs/sysu_agw.py --config.dataset.source=/path/to/SYSU-MM01
"""

from ml_collections import ConfigDict

from configs.default import config_of, refuse_options
from mpanet_jax.methods.agw import AGWSettings


def get_config(options: str = "") -> ConfigDict:
    refuse_options(options)
    return config_of(AGWSettings())
