"""Says whether two images show the same person: their similarity, and with a calibration a probability.

python scripts/verify.py --model=runs/sysu a.jpg b.jpg --modality=visible,infrared
python scripts/verify.py --model=runs/sysu a.jpg b.jpg --modality=visible --prior=0.01

The probability needs a calibration of the model (scripts/calibrate.py), and the modality of both images: pairs of one
modality and of two are calibrated separately. docs/search.md says what the probability must not be used for.
"""

from absl import flags

from mpanet_jax.errors import UserError, run_script

MODEL = flags.DEFINE_string(
    "model", None, "A run's workdir, a file of weights, a saved model's folder, or hf:owner/name.", required=True
)
MODALITY = flags.DEFINE_list(
    "modality", None, "visible or infrared for both images, or one for each: visible,infrared."
)
PRIOR = flags.DEFINE_float("prior", None, "The assumed share of pairs of the same person; default: the calibration's.")
CALIBRATION = flags.DEFINE_string("calibration", None, "The calibration's file; default: that of --model.")
DTYPE = flags.DEFINE_enum("dtype", None, ["auto", "float32", "bfloat16"], "Precision; default: as trained.")


def main(images: list[str]) -> None:
    if len(images) != 2:
        raise UserError(f"expected two images, got {len(images)}")
    modality = MODALITY.value
    if modality and (len(modality) > 2 or not {*modality} <= {"visible", "infrared"}):
        raise UserError(
            f"--modality={','.join(modality)}: expected visible or infrared, or two of them: visible,infrared"
        )
    from mpanet_jax.evaluation.given_images import UnreadableImage  # these import JAX
    from mpanet_jax.model import load

    model = load(MODEL.value, dtype=DTYPE.value)
    pair = modality * 2 if modality and len(modality) == 1 else modality
    try:
        found = model.compare(*images, modality=pair, prior=PRIOR.value, calibration=CALIBRATION.value)
    except UnreadableImage as error:
        raise UserError(f"{error.image.name}: {error.image.reason}; give another image") from error
    print(f"similarity {found.similarity:.4f}")
    if found.probability is None:
        print(f"no probability: {found.note}")
    else:
        kind = found.kind.replace("_", "-")
        print(
            f"probability {found.probability:.4g} that they show the same person ({kind} pair, prior {found.prior:g})"
        )


if __name__ == "__main__":
    flags.FLAGS.set_gnu_getopt(True)  # flags may follow the images
    run_script(main)
