"""AGW on LLCM. Its authors' Rank-1 / mAP: infrared to visible 49.13 / 55.80, visible to infrared 63.72 / 47.21.

python scripts/train.py --config=configs/llcm_agw.py --config.dataset.source=/path/to/LLCM
"""

from ml_collections import ConfigDict

from configs.default import config_of, refuse_options
from mpanet_jax.methods.agw import AGWSettings


def get_config(options: str = "") -> ConfigDict:
    refuse_options(options)
    config = config_of(AGWSettings())
    config.dataset.name = "llcm"
    return config
