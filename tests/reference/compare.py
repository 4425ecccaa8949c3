"""Runs the Flax package and the PyTorch reference on the same weights and batches and measures how far apart they are.

Every function returns relative errors ‖a − b‖ / ‖b‖ (b PyTorch's) by quantity. `python -m tests.reference.compare` prints
the table of the README.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch

from mpanet_jax.losses import LossSettings
from mpanet_jax.models.mpanet import MPANet as FlaxMPANet
from mpanet_jax.models.mpanet import Outputs
from mpanet_jax.optim import create_optimizer, mean_rate_schedule
from mpanet_jax.state import create_train_state, init_variables
from mpanet_jax.step import train_step as flax_train_step
from mpanet_jax.weights import from_flax, to_flax
from tests.reference.model import MPANet, randomise
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
# Gradients that are zero by construction: a BatchNorm follows w, and softmax ignores what φ's bias adds to a whole row.
ZERO_GRADIENTS = ("non_local.w.bias", "non_local.phi.bias")


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
    dtype: str, seed: int = 1, num_ids: int = NUM_IDS, calibrate: torch.Tensor | None = None, **options: Any
) -> tuple[MPANet, FlaxMPANet, dict[str, Any]]:
    """The reference network, the package's model, and the network's weights as the model's variables.

    The running statistics are random, or those of the images `calibrate`.
    """
    options = {**SMALL, **options}
    torch_dtype, jax_dtype = TORCH[dtype], jnp.dtype(dtype)
    network = randomise(MPANet(num_ids, **options).to(torch_dtype), seed)
    if calibrate is not None:
        norms = [part for part in network.modules() if isinstance(part, (torch.nn.BatchNorm1d, torch.nn.BatchNorm2d))]
        for part in norms:
            part.momentum = 1.0
        with torch.no_grad():
            network.train()(calibrate)
        for part in norms:
            part.momentum = 0.1
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
    """f, g and the pattern maps in evaluation or training mode."""
    with jax.enable_x64(dtype == "float64"):
        network, model, variables = pair(dtype, **options)
        images = batches(1)[0]["images"]
        x = normalised(images, dtype)
        outputs = flax_forward(model, variables, x, train=train)
        network.train(train)
        with torch.no_grad():
            expected = network(x)
        errors = {
            "features f": relative_error(outputs.features, expected.feature),
            "embedding g": relative_error(outputs.embedding, expected.embedding),
        }
        if expected.pattern_maps is not None:
            maps = expected.pattern_maps.flatten(2).transpose(1, 2)
            errors["pattern maps M"] = relative_error(outputs.maps, maps)
        return errors


def flax_forward(model: FlaxMPANet, variables: dict[str, Any], x: torch.Tensor, *, train: bool) -> Outputs:
    """The package's network on NCHW images."""
    apply = jax.jit(partial(model.apply, train=train, mutable=["batch_stats"]))
    state = {name: variables[name] for name in ("params", "batch_stats")}
    return apply(state, jnp.asarray(x.numpy().transpose(0, 2, 3, 1)))[0]


def full_size_errors() -> tuple[dict[str, float], float]:
    """ResNet-50 at 384×128, float32, evaluation: errors, and the least cosine between bfloat16 and float32 embeddings.

    Random weights, with running statistics that were taken from images as training takes them, so that activations have
    the sizes that they have in use.
    """
    first, second = (normalised(batch["images"], "float32") for batch in batches(2, 384, 128))
    network, model, variables = pair("float32", calibrate=first[::2], stage_sizes=(3, 4, 6, 3), width=64)
    x = second[[0, 2]]
    with torch.no_grad():
        expected = network.eval()(x)
    outputs = flax_forward(model, variables, x, train=False)
    errors = {
        "features f": relative_error(outputs.features, expected.feature),
        "embedding g": relative_error(outputs.embedding, expected.embedding),
        "pattern maps M": relative_error(outputs.maps, expected.pattern_maps.flatten(2).transpose(1, 2)),
    }
    half = flax_forward(model.clone(dtype=jnp.bfloat16), variables, x, train=False)
    return errors, min_cosine(half.embedding, outputs.embedding)


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
    preset: str, dtype: str, *, steps: int = 5, first_epoch: int = 1, center_cluster: bool = True, **options: Any
) -> dict[str, dict[str, float]]:
    """Errors over `steps` steps of the whole training step, augmentation off, a learning rate that changes.

    Returns:
      `terms` (loss terms, the largest error over the steps), `gradients` (of the first step), and after the last step
      `parameters`, `first moments`, `second moments`, `batch norm statistics` and `mean classifiers`; each by name.
    """
    rates = [3.5e-4, 3.5e-4, 3.5e-5, 3.5e-5, 3.5e-6][:steps]
    with jax.enable_x64(dtype == "float64"):
        network, model, variables = pair(dtype, **options)
        learning = network.modality_learning
        settings = PRESETS[preset]._replace(
            center_cluster=float(center_cluster),
            **({} if learning else {"modality_identity": 0.0, "mutual_mean": 0.0}),
        )
        boundaries = {2: 0.1, 4: 0.1}
        schedule = optax.piecewise_constant_schedule(rates[0], boundaries)
        optimizer = optax.chain(gradient_recorder(), create_optimizer(schedule, 5e-4))
        mean_rate = mean_rate_schedule(0.2, 100 if preset == "official" else None, 1)
        step = jax.jit(
            partial(
                flax_train_step,
                model=model,
                optimizer=optimizer,
                learning_rate=schedule,
                mean_rate=lambda count: mean_rate(count + first_epoch - 1),
                loss_settings=settings,
                augment_settings=None,
                images_per_id=IMAGES_PER_ID,
            )
        )
        variables = jax.tree.map(jnp.asarray, variables)
        state = create_train_state(variables["params"], variables["batch_stats"], optimizer, jax.random.key(0))
        state = state.replace(mean_classifiers=variables["mean_classifiers"])
        torch_optimizer = make_optimizer(network, rates[0])
        names = {name for name, parameter in network.named_parameters() if parameter.requires_grad}

        result: dict[str, dict[str, float]] = {"terms": {}}
        for number, batch in enumerate(batches(steps)):
            labels, modality = (torch.from_numpy(batch[name]).long() for name in ("labels", "modality"))
            images = normalised(batch["images"], dtype)
            terms = train_step(
                network,
                torch_optimizer,
                images,
                labels,
                modality,
                preset=preset,
                epoch=first_epoch + number,
                learning_rate=rates[number],
                center_cluster=center_cluster,
            )
            state, metrics = step(state, batch)
            for name, value in terms.items():
                if TERMS[name] in metrics:
                    error = relative_error(metrics[TERMS[name]], value)
                    result["terms"][name] = max(error, result["terms"].get(name, 0.0))
            if number == 0:
                result["gradients"] = _gradient_errors(network, published(state, state.opt_state[0]))

        adam = state.opt_state[1][1]
        moments = {id(p): torch_optimizer.state[p] for p in torch_optimizer.state}
        ours, mu, nu = (published(state, tree) for tree in (state.params, adam.mu, adam.nu))
        theirs = dict(network.state_dict())
        groups = {"parameters": {}, "first moments": {}, "second moments": {}}
        for name, parameter in network.named_parameters():
            if name in names:
                groups["parameters"][name] = relative_error(ours[name], parameter)
                if name not in ZERO_GRADIENTS:
                    groups["first moments"][name] = relative_error(mu[name], moments[id(parameter)]["exp_avg"])
                    groups["second moments"][name] = relative_error(nu[name], moments[id(parameter)]["exp_avg_sq"])
        groups["batch norm statistics"] = {
            name: relative_error(ours[name], theirs[name]) for name in theirs if "running_" in name
        }
        if learning:
            groups["mean classifiers"] = {
                name: relative_error(ours[name], theirs[name]) for name in theirs if name.endswith("classifier_.weight")
            }
        return result | groups


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
