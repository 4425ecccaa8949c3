"""Converts weights: python scripts/convert_weights.py FROM TO [--drop-classifiers]

FROM: torchvision's or timm's ResNet-50, or a checkpoint of the published MPANet program (.pth, .safetensors), or
  hf:owner/repository, or the --workdir of a training run.
TO: NAME.safetensors or NAME.pth for a state dict in the published names; any other name for an orbax checkpoint.

python scripts/convert_weights.py published.pth runs/published
python scripts/convert_weights.py runs/sysu mpanet.safetensors
"""

from pathlib import Path

from absl import flags

from mpanet_jax.errors import UserError, run_script
from mpanet_jax.weights import RESNET50, convert

DROP_CLASSIFIERS = flags.DEFINE_bool("drop_classifiers", False, "Leave classifiers and mean classifiers out.")
flags.DEFINE_alias("drop-classifiers", "drop_classifiers")
NUM_IDS = flags.DEFINE_integer(
    "num_ids", None, "Identities that the classifiers tell apart; unset: as in FROM.", lower_bound=1
)
STAGE_SIZES = flags.DEFINE_list("stage_sizes", list(map(str, RESNET50)), "Blocks of FROM's stages, where it is a file.")
WIDTH = flags.DEFINE_integer("width", 64, "Channels of FROM's stem, where it is a file.", lower_bound=1)


def main(arguments: list[str]) -> None:
    if len(arguments) != 2:
        raise UserError("expected two arguments: convert_weights.py FROM TO (see --help)")
    source, target = arguments
    if Path(source).resolve() == Path(target).resolve():
        raise UserError(f"{target}: is FROM itself, which would be lost; name another TO")
    try:
        stage_sizes = tuple(map(int, STAGE_SIZES.value))
    except ValueError as error:
        raise UserError(f"--stage_sizes={','.join(STAGE_SIZES.value)}: expected numbers, like 3,4,6,3") from error
    left_out = convert(
        source,
        target,
        stage_sizes=stage_sizes,
        width=WIDTH.value,
        num_ids=NUM_IDS.value,
        drop_classifiers=DROP_CLASSIFIERS.value,
    )
    counters = sum(name.endswith("num_batches_tracked") for name in left_out)
    names = [name for name in left_out if not name.endswith("num_batches_tracked")]
    print(f"wrote {target}")
    if left_out:
        names += [f"{counters} num_batches_tracked"] if counters else []
        print(f"left out: {', '.join(names)}")


if __name__ == "__main__":
    run_script(main)
