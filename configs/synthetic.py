"""The built-in synthetic data set and a small ResNet: trains in minutes on two CPU cores, without licensed data.

python scripts/make_synthetic.py --layout sysu_mm01 --out runs/demo/raw
python scripts/train.py --config=configs/synthetic.py --config.dataset.source=runs/demo/raw --workdir=runs/demo
"""

from ml_collections import ConfigDict

from configs.default import apply_preset
from configs.default import get_config as default_config


def get_config(preset: str = "paper") -> ConfigDict:
    config = default_config()
    config.init_from = ""
    config.dataset.data_dir = "data/synthetic"
    config.data.height, config.data.width = 128, 48
    # The identities have about seven visible and three or four infrared images each: enough for groups of two pairs.
    config.data.images_per_id = 4
    config.model.stage_sizes = (1, 1, 1, 1)
    config.model.width = 16
    # Training from scratch in few steps: a higher learning rate than for fine-tuning, random crops, no erasing.
    config.augment.erase_probability = 0.0
    config.optim.learning_rate = 4e-3
    config.optim.milestones = (29, 38)
    config.train.num_epochs = 44
    config.train.eval_every_epochs = 11
    config.train.checkpoint_every_epochs = 11
    apply_preset(config, preset)
    config.augment.crop_padding = 6  # whatever the preset
    return config
