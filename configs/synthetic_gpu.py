"""The ground of the ablations: the full network on drawn people, half a minute a run on a GPU, no licensed data.

python scripts/make_synthetic.py --scale bench --out data/raw/bench
python scripts/train.py --config=configs/synthetic_gpu.py:official --config.dataset.source=data/raw/bench
"""

from ml_collections import ConfigDict

from configs.default import apply_preset
from configs.default import get_config as default_config


def get_config(preset: str = "paper") -> ConfigDict:
    config = default_config()
    config.dataset.data_dir = "data/bench"
    config.data.height, config.data.width = 192, 64
    # A fifth of the paper's epochs, of 75 steps: 2,100 steps.
    config.optim.milestones = (16, 24)
    config.train.num_epochs = 28
    config.train.eval_every_epochs = 0
    config.train.checkpoint_every_epochs = 0
    apply_preset(config, preset)
    if config.augment.crop_padding:
        config.augment.crop_padding = 5  # half the published program's, as the images are half as high
    if config.mean.epochs_at_full:
        config.mean.epochs_at_full = 20  # 100 of 140 epochs are 20 of 28
    return config
