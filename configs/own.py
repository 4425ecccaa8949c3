"""Your own cameras: a folder of images with images.csv (docs/data.md), with the recipe for SYSU-MM01.

python scripts/train.py --config=configs/own.py --config.dataset.source=/path/to/folder
To start from a trained model, add --config.init_from=runs/sysu. With few identities, lower
--config.data.num_ids_per_batch.
"""

from ml_collections import ConfigDict

from configs.default import apply_preset
from configs.default import get_config as default_config


def get_config(preset: str = "paper") -> ConfigDict:
    config = default_config()
    config.dataset.name = "own"
    return apply_preset(config, preset)
