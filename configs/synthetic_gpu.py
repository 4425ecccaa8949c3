"""The recipe of the ablations: the full network on drawn people, half a minute a run on a GPU, no licensed data.

python scripts/make_synthetic.py --scale bench --out data/raw/bench
python scripts/train.py --config=configs/synthetic_gpu.py:official --config.dataset.source=data/raw/bench
`:paper`, `:official` and `:strong` are recipes of MPANet, `:agw` and `:caj` the other methods.
"""

from ml_collections import ConfigDict

from configs.default import apply_preset, config_of
from mpanet_jax.methods.agw import AGWSettings
from mpanet_jax.methods.caj import CAJSettings
from mpanet_jax.methods.mpanet import MPANetSettings

OTHERS = {"agw": AGWSettings, "caj": CAJSettings}


def get_config(preset: str = "paper") -> ConfigDict:
    config = config_of(OTHERS.get(preset, MPANetSettings)())
    config.init_from = ""
    config.dataset.data_dir = "data/bench"
    config.data.height, config.data.width = 192, 64
    config.train.eval_every_epochs = 0
    config.train.checkpoint_every_epochs = 0
    if preset in OTHERS:
        # 12 epochs of 346 steps of 64 images: nearly as many images as MPANet sees. The schedule shrinks with them.
        config.train.num_epochs = 12
        config.optim.warmup_epochs = 2
        config.optim.milestones = (3, 7)
    else:
        # A fifth of the paper's epochs, each of 75 steps of 128 images: 2,100 steps.
        config.train.num_epochs = 28
        config.optim.milestones = (16, 24)
        apply_preset(config, preset)
        if config.mean.epochs_at_full:
            config.mean.epochs_at_full = 20  # 100 of 140 epochs are 20 of 28
    if config.augment.crop_padding:
        config.augment.crop_padding = 5  # half the published programs' padding, for images half as high
    return config
