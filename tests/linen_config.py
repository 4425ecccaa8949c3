"""The recipe of `LinenMethod`, for scripts that a test runs in its own process, where METHODS has it as 'linen'.

Its network compiles in a moment.
"""

from ml_collections import ConfigDict

from configs.default import config_of
from mpanet_jax.settings import Settings


def get_config() -> ConfigDict:
    config = config_of(Settings())
    config.method = "linen"
    config.init_from = ""
    config.data.height, config.data.width = 32, 16
    config.data.num_ids_per_batch, config.data.images_per_id = 3, 4
    config.augment.flip_probability = config.augment.erase_probability = 0.0
    return config
