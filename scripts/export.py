"""Writes a trained model as one file for other programs: ONNX, StableHLO, or weights in the published names.

python scripts/export.py --model=runs/sysu --out=model.onnx
python scripts/export.py --model=runs/sysu --out=model.stablehlo --batch=32
python scripts/export.py --model=runs/agw --out=infrared.onnx --modality=infrared
python scripts/export.py --model=runs/sysu --out=model.pth       (or .safetensors)

ONNX and StableHLO files take RGB images uint8[B, height, width, 3], already resized, and return embeddings; a file is
checked against the model before it is put in place. docs/export.md shows how to run them. Files of weights have the
published program's names and no classifiers (scripts/convert_weights.py keeps these).
"""

from pathlib import Path

from absl import flags

from mpanet_jax.errors import UserError, run_script

MODEL = flags.DEFINE_string(
    "model", None, "A run's workdir, a file of weights, a saved model's folder, or hf:owner/name.", required=True
)
OUT = flags.DEFINE_string("out", None, "The file to write: .onnx, .stablehlo, .safetensors or .pth.", required=True)
BATCH = flags.DEFINE_string("batch", "dynamic", "B, the number of images at once; dynamic: any.")
MODALITY = flags.DEFINE_enum(
    "modality", None, ["visible", "infrared"], "The modality of all images; default: any, see docs/export.md."
)
NORMALIZE = flags.DEFINE_bool("normalize", True, "Give embeddings of length 1.")
SUFFIXES = (".onnx", ".stablehlo", ".safetensors", ".pth")


def main(arguments: list[str]) -> None:
    if arguments:
        raise UserError(f"{arguments[0]}: not a flag; see --help")
    suffix = Path(OUT.value).suffix
    if suffix not in SUFFIXES or Path(OUT.value).is_dir():
        raise UserError(f"--out={OUT.value}: expected the name of a file that ends in {', '.join(SUFFIXES)}")
    if not (BATCH.value == "dynamic" or (BATCH.value.isdecimal() and int(BATCH.value) > 0)):
        raise UserError(f"--batch={BATCH.value}: expected a positive number of images, or dynamic")
    if suffix in (".safetensors", ".pth"):
        if BATCH.value != "dynamic" or MODALITY.value or not NORMALIZE.value:
            raise UserError(f"--batch, --modality and --normalize go with .onnx and .stablehlo, not with {suffix}")
        from mpanet_jax.weights.convert import convert

        convert(MODEL.value, OUT.value, drop_classifiers=True)
    else:
        from mpanet_jax.export.onnx_file import export_onnx, require_onnx  # imports JAX
        from mpanet_jax.export.stablehlo import export_stablehlo
        from mpanet_jax.model import load

        if suffix == ".onnx":
            require_onnx()  # before the work, not after it
        write = export_onnx if suffix == ".onnx" else export_stablehlo
        batch = BATCH.value if BATCH.value == "dynamic" else int(BATCH.value)
        write(load(MODEL.value), OUT.value, batch=batch, modality=MODALITY.value, normalize=NORMALIZE.value)
    print(f"{OUT.value}: {Path(OUT.value).stat().st_size / 2**20:.1f} MiB")


if __name__ == "__main__":
    run_script(main)
