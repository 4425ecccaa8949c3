"""The built-in synthetic data set and a small ResNet: minutes on two CPU cores, no licensed data needed.

python scripts/make_synthetic.py --layout sysu_mm01 --out runs/synthetic/raw
python scripts/train.py --config=configs/synthetic.py --config.dataset.source=runs/synthetic/raw --workdir=runs/synthetic
"""

from ml_collections import ConfigDict

from configs.default import apply_preset
from configs.default import get_config as default_config


def get_config(preset: str = "paper") -> ConfigDict:
    config = default_config()
    config.dataset.data_dir = "data/synthetic"
    config.data.height, config.data.width = 96, 40
    config.data.num_ids_per_batch = 8
    config.model.stage_sizes = (1, 1, 1, 1)
    config.model.width = 16
    config.optim.learning_rate = 2e-3
    config.optim.milestones = (20, 26)
    config.train.num_epochs = 30
    config.train.eval_every_epochs = 10
    config.train.checkpoint_every_epochs = 5
    return apply_preset(config, preset)
