"""Converts weights: python scripts/convert_weights.py FROM TO [--drop-classifiers] [--config=configs/NAME.py …]

FROM: a file (.pth, .safetensors) of torchvision's or timm's ResNet-50 or of the published MPANet program,
  hf:owner/repository, or the workdir of a training run.
TO: NAME.safetensors or NAME.pth for a state dict in the published names. Any other name is a folder with an orbax
  checkpoint and the settings, for evaluate.py and extract.py.

A run, and what this script writes except .pth, carry the settings of their network. Weights that carry none are taken
for ResNet-50 and the paper's MPANet; for another network name a config, or its size only.

python scripts/convert_weights.py published.pth runs/published
python scripts/convert_weights.py runs/sysu mpanet.safetensors
python scripts/convert_weights.py se.pth runs/se --config=configs/sysu.py --config.model.channel_module=se
"""

from pathlib import Path

from absl import flags
from ml_collections import config_flags

from mpanet_jax.errors import SettingsError, UserError, run_script

CONFIG = config_flags.DEFINE_config_file(
    "config", None, "The network of FROM, if FROM carries no settings.", lock_config=True
)
DROP_CLASSIFIERS = flags.DEFINE_bool("drop_classifiers", False, "Leave classifiers and mean classifiers out.")
flags.DEFINE_alias("drop-classifiers", "drop_classifiers")
NUM_IDS = flags.DEFINE_integer(
    "num_ids", None, "The number of identities that FROM's classifiers must have; default: any.", lower_bound=1
)
STAGE_SIZES = flags.DEFINE_list("stage_sizes", None, "Blocks of FROM's stages; default: config.model.stage_sizes.")
WIDTH = flags.DEFINE_integer("width", None, "Channels of FROM's stem; default: config.model.width.", lower_bound=1)


def main(arguments: list[str]) -> None:
    if len(arguments) != 2:
        raise UserError("expected two arguments: convert_weights.py FROM TO (see --help)")
    source, target = arguments
    if Path(source).resolve() == Path(target).resolve():
        raise UserError(f"{target}: is FROM too, and would be overwritten; name another TO")
    size = {}
    if STAGE_SIZES.value is not None:
        try:
            size["model.stage_sizes"] = tuple(map(int, STAGE_SIZES.value))
        except ValueError as error:
            raise UserError(f"--stage_sizes={','.join(STAGE_SIZES.value)}: expected numbers, like 3,4,6,3") from error
    if WIDTH.value is not None:
        size["model.width"] = WIDTH.value
    from mpanet_jax.methods import settings_of  # imports JAX, which --help does not need
    from mpanet_jax.settings_base import replace
    from mpanet_jax.weights.convert import convert, settings_of_weights

    settings = settings_of(CONFIG.value.to_dict()) if CONFIG.value is not None else None
    if size:
        settings = settings or settings_of_weights(source) or settings_of({})
        try:
            settings = replace(settings, size)
        except SettingsError as error:
            raise UserError(f"--stage_sizes, --width: {error}") from error
    left_out = convert(
        source, target, settings=settings, num_ids=NUM_IDS.value, drop_classifiers=DROP_CLASSIFIERS.value
    )
    counters = sum(name.endswith("num_batches_tracked") for name in left_out)
    names = [name for name in left_out if not name.endswith("num_batches_tracked")]
    print(f"wrote {target}")
    if left_out:
        names += [f"{counters} num_batches_tracked"] if counters else []
        print(f"left out: {', '.join(names)}")


if __name__ == "__main__":
    run_script(main)
