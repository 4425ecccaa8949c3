"""CAJ on LLCM. Its authors' Rank-1 / mAP: infrared to visible 49.86 / 56.40, visible to infrared 63.73 / 47.71.

python scripts/train.py --config=configs/llcm_caj.py --config.dataset.source=/path/to/LLCM
"""

from ml_collections import ConfigDict

from configs.default import config_of, refuse_options
from mpanet_jax.methods.caj import CAJSettings


def get_config(options: str = "") -> ConfigDict:
    refuse_options(options)
    config = config_of(CAJSettings())
    config.dataset.name = "llcm"
    return config
