"""CAJ on RegDB. Published Rank-1 / mAP / mINP: 85.03 / 79.14 / 65.33 (visible to infrared).

python scripts/train.py --config=configs/regdb_caj.py:split=3 --config.dataset.source=/path/to/RegDB
`split=N` chooses the trial, 1 to 10.
"""

from ml_collections import ConfigDict

from configs.default import config_of
from configs.regdb import take_split
from mpanet_jax.methods.caj import CAJSettings


def get_config(options: str = "") -> ConfigDict:
    config = config_of(CAJSettings())
    if other := take_split(config, options):
        raise ValueError(f"config option {other!r}: expected split=1 to split=10")
    return config
