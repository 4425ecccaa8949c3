"""Runs the Flax package and the PyTorch reference on the same weights and batches and measures how far apart they are.

Errors are relative, ‖a − b‖ / ‖b‖ with b PyTorch's, by quantity.
`python -m tests.reference.compare` prints the README's table.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch

from mpanet_jax.losses import LossSettings, total_loss
from mpanet_jax.models.mpanet import MPANet as FlaxMPANet
from mpanet_jax.models.mpanet import Outputs
from mpanet_jax.optim import create_optimizer, mean_rate_schedule
from mpanet_jax.state import TrainState, create_train_state, init_variables
from mpanet_jax.step import loss_terms
from mpanet_jax.step import train_step as flax_train_step
from mpanet_jax.weights import from_flax, to_flax
from tests.reference.losses import losses
from tests.reference.model import MPANet, randomise
from tests.reference.model import Outputs as ReferenceOutputs
from tests.reference.train import make_optimizer, train_step

SMALL = {"stage_sizes": (1, 2, 1, 1), "width": 8}
NUM_IDS, IDENTITIES, IMAGES_PER_ID = 5, 3, 4
HEIGHT, WIDTH = 128, 64
TORCH = {"float32": torch.float32, "float64": torch.float64}
# The reference's names of the loss terms, and the package's.
TERMS = {
    "id": "identity",
    "cc": "center_cluster",
    "sep": "separation",
    "sid": "modality_identity",
    "mm": "mutual_mean",
    "total": "loss",
}
PRESETS = {
    "paper": LossSettings(),
    "official": LossSettings(modality_identity=1.0, per_modality_identity=False, student_first=True),
}
# Gradients that are zero by construction: a BatchNorm follows w, hence also g's bias; softmax ignores what φ's bias
# adds to a whole row; and the neck and the distances of L_cc ignore what bn's bias adds to every f.
ZERO_GRADIENTS = tuple(f"non_local.{layer}.bias" for layer in ("w", "g", "phi", "bn"))


def relative_error(a: Any, b: Any) -> float:
    """‖a − b‖ / ‖b‖ in float64; ‖a‖ where b is 0."""
    a, b = (np.asarray(x.detach() if isinstance(x, torch.Tensor) else x).astype(np.float64) for x in (a, b))
    assert a.shape == b.shape, (a.shape, b.shape)
    return float(np.linalg.norm(a - b) / (np.linalg.norm(b) or 1.0))


def batches(count: int, height: int = HEIGHT, width: int = WIDTH) -> list[dict[str, np.ndarray]]:
    """Fixed train batches (DESIGN: "Train batch"): blobs around a colour of each image; infrared images are grey.

    Blobs of 16 pixels, and 8×4 positions in the last feature maps, so that these vary: on a nearly constant map,
    instance norm multiplies rounding errors by up to 1/√eps, in both implementations.
    """
    rng = np.random.default_rng(0)
    size = IDENTITIES * IMAGES_PER_ID
    modality = np.tile(np.repeat([0, 1], IMAGES_PER_ID // 2), IDENTITIES).astype(np.int32)
    made = []
    for _ in range(count):
        colour, contrast = rng.uniform(40, 215, (size, 1, 1, 3)), rng.uniform(20, 80, (size, 1, 1, 1))
        blobs = rng.standard_normal((size, height // 16, width // 16, 3)).repeat(16, axis=1).repeat(16, axis=2)
        noise = blobs + 0.3 * rng.standard_normal((size, height, width, 3))
        images = np.clip(colour + contrast * noise, 0, 255).astype(np.uint8)
        images[modality == 1] = images[modality == 1][..., :1]
        labels = np.repeat(rng.permutation(NUM_IDS)[:IDENTITIES], IMAGES_PER_ID).astype(np.int32)
        made.append({"images": images, "labels": labels, "modality": modality})
    return made


def normalised(images: np.ndarray, dtype: str) -> torch.Tensor:
    """ImageNet statistics, NCHW."""
    x = (images.astype(np.float64) / 255 - (0.485, 0.456, 0.406)) / (0.229, 0.224, 0.225)
    return torch.from_numpy(x.transpose(0, 3, 1, 2).copy()).to(TORCH[dtype])


def numpy_state_dict(network: torch.nn.Module) -> dict[str, np.ndarray]:
    return {name: value.detach().numpy().copy() for name, value in network.state_dict().items()}


def pair(
    dtype: str, seed: int = 1, num_ids: int = NUM_IDS, residual_scale: float = 1.0, **options: Any
) -> tuple[MPANet, FlaxMPANet, dict[str, Any]]:
    """The reference network, the package's model, and the network's weights as the model's variables.

    `residual_scale` multiplies the weights of the last BatchNorm of each block.
    """
    options = {**SMALL, **options}
    torch_dtype, jax_dtype = TORCH[dtype], jnp.dtype(dtype)
    network = randomise(MPANet(num_ids, **options).to(torch_dtype), seed)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if name.endswith("bn3.weight"):
                parameter.mul_(residual_scale)
    model = FlaxMPANet(
        num_ids=num_ids,
        stage_sizes=options["stage_sizes"],
        width=options["width"],
        channel_module=options.get("mam", "mam"),
        pattern_module=options.get("pam", "pam"),
        dtype=jax_dtype,
        param_dtype=jax_dtype,
    )
    state_dict = numpy_state_dict(network)
    if not network.modality_learning:  # the package's model keeps the classifiers, without a loss on them
        for name in ("visible_classifier", "infrared_classifier", "visible_classifier_", "infrared_classifier_"):
            state_dict[f"{name}.weight"] = np.zeros_like(state_dict["classifier.weight"])
    template = jax.eval_shape(lambda key: init_variables(model, key, 32, 32), jax.random.key(0))
    variables, _ = to_flax(state_dict, template)
    return network, model, variables


def forward_errors(dtype: str, *, train: bool, **options: Any) -> dict[str, float]:
    """f, g and the pattern maps; in training mode also the loss terms of both presets."""
    with jax.enable_x64(dtype == "float64"):
        network, model, variables = pair(dtype, **options)
        batch = batches(1)[0]
        x = normalised(batch["images"], dtype)
        outputs = flax_forward(model, variables, x, train=train)
        network.train(train)
        with torch.no_grad():
            expected = network(x)
        errors = output_errors(outputs, expected)
        labels, modality = _labels_and_modality(batch)
        mean_classifiers, arrays = jax.tree.map(jnp.asarray, (variables["mean_classifiers"], batch))
        for preset, settings in PRESETS.items() if train else ():
            terms = loss_terms(
                outputs, mean_classifiers, arrays, settings=settings, images_per_id=IMAGES_PER_ID, dtype=model.dtype
            )
            terms["loss"] = total_loss(terms, settings)
            for name, value in losses(network, expected, labels, modality, preset=preset).items():
                errors[f"loss term {name}, {preset}"] = relative_error(terms[TERMS[name]], value)
        return errors


def _labels_and_modality(batch: dict[str, np.ndarray]) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.from_numpy(batch["labels"]).long(), torch.from_numpy(batch["modality"]).long()


def output_errors(outputs: Outputs, expected: ReferenceOutputs) -> dict[str, float]:
    """Errors of f, g and M."""
    errors = {
        "features f": relative_error(outputs.features, expected.feature),
        "embedding g": relative_error(outputs.embedding, expected.embedding),
    }
    if expected.pattern_maps is not None:
        errors["pattern maps M"] = relative_error(outputs.maps, expected.pattern_maps.flatten(2).transpose(1, 2))
    return errors


def flax_forward(model: FlaxMPANet, variables: dict[str, Any], x: torch.Tensor, *, train: bool) -> Outputs:
    """The package's network on NCHW images."""
    apply = jax.jit(partial(model.apply, train=train, mutable=["batch_stats"]))
    state = {name: variables[name] for name in ("params", "batch_stats")}
    return apply(state, jnp.asarray(x.numpy().transpose(0, 2, 3, 1)))[0]


def full_size_errors() -> tuple[dict[str, float], dict[str, float]]:
    """ResNet-50 at 384×128, evaluation: float32 errors, and how far bfloat16 takes the embedding from float32.

    The residual branches are scaled down, as training scales them (last BN weights well below 1): 50 random layers
    with unit weights amplify any rounding error, in both implementations, until bfloat16 has no meaning.

    Returns:
      Errors as `forward_errors`, and the least cosine of bfloat16 and float32 embeddings, of this package and, under
      `PyTorch`, of the reference under PyTorch's autocast.
    """
    network, model, variables = pair("float32", residual_scale=0.3, stage_sizes=(3, 4, 6, 3), width=64)
    x = normalised(batches(1, 384, 128)[0]["images"][[0, 2]], "float32")
    network.eval()
    with torch.no_grad():
        expected = network(x)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            expected_half = network(x)
    outputs = flax_forward(model, variables, x, train=False)
    half = flax_forward(model.clone(dtype=jnp.bfloat16), variables, x, train=False)
    cosines = {
        "this package": min_cosine(half.embedding, outputs.embedding),
        "PyTorch": min_cosine(expected_half.embedding.float(), expected.embedding),
    }
    return output_errors(outputs, expected), cosines


def min_cosine(a: Any, b: Any) -> float:
    """The smallest cosine similarity between corresponding rows."""
    a, b = (np.asarray(x, np.float64) for x in (a, b))
    return float(((a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)).min())


def gradient_recorder() -> optax.GradientTransformation:
    """Passes gradients on and keeps the last ones as its state."""
    return optax.GradientTransformation(
        lambda params: jax.tree.map(jnp.zeros_like, params), lambda gradients, _, params=None: (gradients, gradients)
    )


def training_errors(
    preset: str, *, steps: int = 5, first_epoch: int = 1, center_cluster: bool = True, **options: Any
) -> dict[str, dict[str, float]]:
    """Float64 errors over `steps` steps of the whole training step, augmentation off, a learning rate that changes.

    Returns:
      By name: `terms` (loss terms, the largest error over the steps), `gradients` (of the first step) and, after the
      last step, `batch norm statistics`. One step leaves the optimiser out; more than one also give `parameters`,
      `first moments`, `second moments` and `mean classifiers` after the last step.
    """
    rates = [3.5e-4, 3.5e-4, 3.5e-5, 3.5e-5, 3.5e-6][:steps]
    with jax.enable_x64(True):
        network, model, variables = pair("float64", **options)
        settings = PRESETS[preset]._replace(center_cluster=float(center_cluster))
        if not network.modality_learning:
            settings = settings._replace(modality_identity=0.0, mutual_mean=0.0)
        schedule = optax.piecewise_constant_schedule(rates[0], {2: 0.1, 4: 0.1})
        optimizer = gradient_recorder()
        if steps > 1:
            optimizer = optax.chain(optimizer, create_optimizer(schedule, 5e-4))
        mean_rate = mean_rate_schedule(0.2, 100 if preset == "official" else None, 1)
        step = flax_step(model, optimizer, settings, schedule, lambda count: mean_rate(count + first_epoch - 1))
        state = flax_state(variables, optimizer)
        torch_optimizer = make_optimizer(network, rates[0])

        errors: dict[str, dict[str, float]] = {"terms": {}}
        for number, batch in enumerate(batches(steps, 64, 32)):
            terms = train_step(
                network,
                torch_optimizer,
                normalised(batch["images"], "float64"),
                *_labels_and_modality(batch),
                preset=preset,
                epoch=first_epoch + number,
                learning_rate=rates[number],
                center_cluster=center_cluster,
            )
            state, metrics = step(state, batch)
            for name in terms.keys() & {name for name in TERMS if TERMS[name] in metrics}:
                error = relative_error(metrics[TERMS[name]], terms[name])
                errors["terms"][name] = max(error, errors["terms"].get(name, 0.0))
            if number == 0:
                recorded = state.opt_state if steps == 1 else state.opt_state[0]
                errors["gradients"] = _gradient_errors(network, published(state, recorded))

        ours, theirs = published(state, state.params), numpy_state_dict(network)
        trained = {name: parameter for name, parameter in network.named_parameters() if parameter.requires_grad}
        compared = {"batch norm statistics": [name for name in theirs if "running_" in name]}
        if steps > 1:
            compared["parameters"] = list(trained)
            compared["mean classifiers"] = [name for name in theirs if name.endswith("classifier_.weight")]
            adam = state.opt_state[1][1]
            for quantity, moment, key in (("first", adam.mu, "exp_avg"), ("second", adam.nu, "exp_avg_sq")):
                moment = published(state, moment)
                errors[f"{quantity} moments"] = {
                    name: relative_error(moment[name], torch_optimizer.state[parameter][key])
                    for name, parameter in trained.items()
                }
        for quantity, names in compared.items():
            errors[quantity] = {name: relative_error(ours[name], theirs[name]) for name in names}
        return errors


def flax_step(model: FlaxMPANet, optimizer: Any, settings: LossSettings, learning_rate: Any, mean_rate: Any) -> Any:
    """The package's training step, compiled, without augmentation."""
    return jax.jit(
        partial(
            flax_train_step,
            model=model,
            optimizer=optimizer,
            learning_rate=learning_rate,
            mean_rate=mean_rate,
            loss_settings=settings,
            augment_settings=None,
            images_per_id=IMAGES_PER_ID,
        ),
        compiler_options={"xla_backend_optimization_level": "0"},  # compiled once, run a few times
    )


def flax_state(variables: dict[str, Any], optimizer: optax.GradientTransformation) -> TrainState:
    """The state before the first step, with the mean classifiers of `variables`."""
    variables = jax.tree.map(jnp.asarray, variables)
    state = create_train_state(variables["params"], variables["batch_stats"], optimizer, jax.random.key(0))
    return state.replace(mean_classifiers=variables["mean_classifiers"])


def flax_gradients(batch: dict[str, np.ndarray]) -> tuple[Any, dict[str, Any]]:
    """Gradients and metrics of one float32 step of the package on `batch`."""
    _, model, variables = pair("float32", stage_sizes=(1, 1, 1, 1))
    recorder = gradient_recorder()
    step = flax_step(model, recorder, LossSettings(), lambda count: 0.0, lambda count: 0.2)
    state, metrics = step(flax_state(variables, recorder), batch)
    return state.opt_state, metrics


def published(state: Any, params: Any) -> dict[str, np.ndarray]:
    """A tree shaped like the parameters, with the state's statistics and mean classifiers, in the published names."""
    return from_flax({"params": params, "batch_stats": state.batch_stats, "mean_classifiers": state.mean_classifiers})


def _gradient_errors(network: MPANet, gradients: dict[str, np.ndarray]) -> dict[str, float]:
    theirs = {name: p.grad.numpy() for name, p in network.named_parameters() if p.requires_grad}
    whole = np.sqrt(sum((gradient.astype(np.float64) ** 2).sum() for gradient in theirs.values()))
    return {
        # A gradient that is zero but for rounding is measured against the whole gradient.
        name: float(np.linalg.norm(gradients[name]) / whole)
        if name in ZERO_GRADIENTS
        else relative_error(gradients[name], theirs[name])
        for name in theirs
    }


VARIANTS = {
    "MAM off": {"mam": "none"},
    "MAM → SE": {"mam": "se"},
    "MAM → IN": {"mam": "in"},
    "PAM off": {"pam": "none"},
    "PAM → non-local": {"pam": "non_local"},
    "MAM + PAM → CBAM": {"mam": "cbam", "pam": "none"},
    "ML off": {"modality_learning": False},
    "CC off": {"center_cluster": False},
    "baseline": {"mam": "none", "pam": "none", "modality_learning": False, "center_cluster": False},
}


def table() -> str:
    """The README's table, in Markdown."""
    rows = []

    def add(quantity: str, preset: str, precision: str, errors: dict[str, float]) -> None:
        rows.append((quantity, preset, precision, f"{max(errors.values()):.1e}"))

    for precision in ("float32", "float64"):
        for mode in ("evaluation", "training"):
            errors = forward_errors(precision, train=mode == "training")
            for quantity in [name for name in errors if "loss" not in name]:
                add(f"{quantity}, {mode}", "both", precision, {quantity: errors.pop(quantity)})
            for preset in PRESETS if errors else ():
                values = {name: error for name, error in errors.items() if name.endswith(preset)}
                add("loss terms", preset, precision, values)
    errors, cosines = full_size_errors()
    for quantity, error in errors.items():
        add(f"{quantity}, ResNet-50 at 384×128, evaluation", "both", "float32", {quantity: error})
    for preset in PRESETS:
        errors = training_errors(preset, first_epoch=139)
        add("gradient of each parameter", preset, "float64", errors.pop("gradients"))
        add("loss terms, five steps", preset, "float64", errors.pop("terms"))
        for quantity, values in errors.items():
            add(f"{quantity}, after five steps", preset, "float64", values)
    for name, options in VARIANTS.items():
        errors = training_errors("paper", steps=1, stage_sizes=(1, 1, 1, 1), **options)
        add(f"loss terms, {name}", "paper", "float64", errors["terms"])
        add(f"gradients, {name}", "paper", "float64", errors["gradients"])
    lines = ["| quantity | preset | precision | largest relative error |", "|---|---|---|---|"]
    lines += ["| " + " | ".join(row) + " |" for row in rows]
    lines += [
        f"\nbfloat16 against float32, ResNet-50 at 384×128: cosine of embeddings at least {cosines['this package']:.5f}"
    ]
    lines += [f"(PyTorch under autocast: {cosines['PyTorch']:.5f})"]
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
