"""Runs the Flax package and the PyTorch reference on the same weights and batches and measures how far apart they are.

Errors are relative, ‖a − b‖ / ‖b‖ with b PyTorch's in float64, by quantity.
`python -m tests.reference.compare` prints the table of docs/parity.md, `--markdown` the whole page.
"""

import argparse
import copy
import dataclasses
import datetime
import functools
import os
import platform
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch

from benchmarks.provenance import commit, processor
from mpanet_jax.methods.mpanet import MPANet as Method
from mpanet_jax.methods.mpanet import MPANetSettings, mean_rate_schedule
from mpanet_jax.models.fused import fuse
from mpanet_jax.models.mpanet import Outputs
from mpanet_jax.optim import adam
from mpanet_jax.settings_base import replace
from mpanet_jax.state import TrainState, create_train_state
from mpanet_jax.step import train_step as flax_train_step
from mpanet_jax.weights.convert import template_of
from mpanet_jax.weights.names import from_state_dict, to_state_dict
from tests.reference.losses import losses
from tests.reference.model import MPANet, randomise
from tests.reference.model import Outputs as ReferenceOutputs
from tests.reference.resnet import BasicBlock, Bottleneck
from tests.reference.train import make_optimizer, train_step

SMALL = {"stage_sizes": (1, 2, 1, 1), "width": 8}
FORMS = {"plain": "off", "fused": "on"}  # model.fused
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
    "paper": {},
    "official": {
        "loss.modality_identity": 1.0,
        "loss.per_modality_identity": False,
        "loss.student_first": True,
        "mean.epochs_at_full": 100,
    },
}
NO_AUGMENTATION = {"augment.flip_probability": 0.0, "augment.erase_probability": 0.0}
# Gradients that are zero by construction: a BatchNorm follows w, hence also g's bias; softmax ignores what φ's bias
# adds to a whole row; and the neck and the distances of L_cc ignore what bn's bias adds to every f.
ZERO_GRADIENTS = tuple(f"non_local.{layer}.bias" for layer in ("w", "g", "phi", "bn"))


def relative_error(a: Any, b: Any) -> float:
    """‖a − b‖ / ‖b‖ in float64; ‖a‖ where b is 0."""
    a, b = (np.asarray(x.detach() if isinstance(x, torch.Tensor) else x).astype(np.float64) for x in (a, b))
    assert a.shape == b.shape, (a.shape, b.shape)
    return float(np.linalg.norm(a - b) / (np.linalg.norm(b) or 1.0))


def batches(count: int, height: int = HEIGHT, width: int = WIDTH) -> list[dict[str, np.ndarray]]:
    """Fixed train batches (docs/method.md): blobs around a colour of each image; infrared images are grey.

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


@dataclass(frozen=True)
class ComparedMethod(Method):
    """The package's method, whose schedules, optimiser and number of blocks a comparison may replace.

    The settings allow no stage without a block; `stage_sizes` does.
    """

    schedule: Any = None
    average: Any = None
    chain: Any = None
    stage_sizes: tuple[int, ...] = ()

    def network(self, num_ids: int, axis_name: str | None = None) -> Any:
        network = super().network(num_ids, axis_name)
        if not self.stage_sizes:
            return network
        return network.clone(backbone=dataclasses.replace(network.backbone, stage_sizes=self.stage_sizes))

    def build(self, num_ids: int, axis_name: str | None = None) -> Any:
        """As in the package, without looking first whether the network has blocks that can be fused: it has."""
        network = self.network(num_ids, axis_name)
        return fuse(network) if self.settings.model.fused == "on" else network

    def learning_rate(self, steps_per_epoch: int) -> Any:
        return self.schedule or super().learning_rate(steps_per_epoch)

    def average_rate(self, steps_per_epoch: int) -> Any:
        return self.average or super().average_rate(steps_per_epoch)

    def optimizer(self, learning_rate: Any) -> Any:
        return self.chain or super().optimizer(learning_rate)


def pair(
    dtype: str,
    seed: int = 1,
    num_ids: int = NUM_IDS,
    residual_scale: float = 1.0,
    form: str = "plain",
    fields: dict[str, Any] | None = None,
    **options: Any,
) -> tuple[MPANet, ComparedMethod, dict[str, Any]]:
    """The reference network, the package's method, and the network's weights as the method's variables.

    `residual_scale` multiplies the weights of the last BatchNorm of each block; `fields` are further settings.
    """
    options = {**SMALL, **options}
    stage_sizes = tuple(options["stage_sizes"])
    settings = replace(
        MPANetSettings(),
        {
            "dtype": dtype,
            "data.images_per_id": IMAGES_PER_ID,
            "model.width": options["width"],
            "model.channel_module": options.get("mam", "mam"),
            "model.pattern_module": options.get("pam", "pam"),
            **NO_AUGMENTATION,
        },
    )
    method = ComparedMethod(settings, stage_sizes=stage_sizes)
    network, variables = _network_and_variables(method, seed, num_ids, residual_scale, **options)
    settings = replace(settings, {"model.fused": FORMS[form], **(fields or {})})
    return copy.deepcopy(network), dataclasses.replace(method, settings=settings), variables


@functools.cache  # the same for both forms and all losses
def _network_and_variables(
    method: ComparedMethod, seed: int, num_ids: int, residual_scale: float, **options: Any
) -> tuple[MPANet, dict[str, Any]]:
    network = randomise(MPANet(num_ids, **options).to(TORCH[method.settings.dtype]), seed)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if name.endswith("bn3.weight"):
                parameter.mul_(residual_scale)
    state_dict = numpy_state_dict(network)
    if not network.modality_learning:  # the package's model keeps the classifiers, without a loss on them
        for name in ("visible_classifier", "infrared_classifier", "visible_classifier_", "infrared_classifier_"):
            state_dict[f"{name}.weight"] = np.zeros_like(state_dict["classifier.weight"])
    variables, _ = from_state_dict(state_dict, template_of(method, num_ids), method.names())
    return network, variables


def forward_errors(dtype: str, *, train: bool, form: str = "plain", **options: Any) -> dict[str, float]:
    """f, g and the pattern maps; in training mode also the loss terms of both presets.

    PyTorch computes in float64, from the same weights and images, so that its own rounding is no part of the errors.
    """
    with jax.enable_x64(dtype == "float64"):
        _, method, variables = pair(dtype, form=form, **options)
        batch = batches(1)[0]
        presets = {name: Method(replace(method.settings, fields)) for name, fields in PRESETS.items() if train}

        def terms_of_presets(outputs: Outputs) -> dict[str, dict[str, Any]]:
            averages, arrays = jax.tree.map(jnp.asarray, (variables["averages"], batch))
            terms = {}
            for preset, of_preset in presets.items():
                terms[preset] = of_preset.loss_terms(outputs, arrays, averages)
                weights = of_preset.loss_weights()
                terms[preset]["loss"] = sum(weight * terms[preset][name] for name, weight in weights.items())
            return terms

        x = normalised(batch["images"], dtype)
        outputs, terms = flax_forward(method, variables, x, train=train, then=lambda o: (o, terms_of_presets(o)))
        expected, expected_terms = _expected_forward(dtype, train, **options)
        errors = output_errors(outputs, expected)
        for preset, values in expected_terms.items():
            for name, value in values.items():
                errors[f"loss term {name}, {preset}"] = relative_error(terms[preset][TERMS[name]], value)
        return errors


@functools.cache  # the same for both forms
def _expected_forward(
    dtype: str, train: bool, **options: Any
) -> tuple[ReferenceOutputs, dict[str, dict[str, torch.Tensor]]]:
    """PyTorch's outputs and, in training mode, its loss terms by preset."""
    network, _, _ = pair(dtype, **options)
    batch = batches(1)[0]
    network = network.double().train(train)
    with torch.no_grad():
        outputs = network(normalised(batch["images"], dtype).double())
        labels, modality = _labels_and_modality(batch)
        presets = PRESETS if train else ()
        return outputs, {p: losses(network, outputs, labels, modality, preset=p) for p in presets}


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


def flax_forward(
    method: Method, variables: dict[str, Any], x: torch.Tensor, *, train: bool, then: Any = lambda outputs: outputs
) -> Any:
    """What `then` makes of the outputs of the package's network on NCHW images, in one program."""
    network = method.build(NUM_IDS)

    def forward(state: dict[str, Any], images: Any) -> Any:
        return then(network.apply(state, images, train=train, mutable=["batch_stats"])[0])

    # Compiled once, run once: most of the time would go into optimising it.
    apply = jax.jit(forward, compiler_options={"xla_backend_optimization_level": "0"})
    state = {name: variables[name] for name in ("params", "batch_stats")}
    return apply(state, jnp.asarray(x.numpy().transpose(0, 2, 3, 1)))


def full_size_errors(form: str = "plain") -> tuple[dict[str, float], dict[str, float]]:
    """ResNet-50 at 384×128, evaluation: float32 errors, and how far bfloat16 takes the embedding from float32.

    The residual branches are scaled down, as training scales them (last BN weights well below 1): 50 random layers
    with unit weights amplify any rounding error, in both implementations, until bfloat16 has no meaning.

    Returns:
      Errors as `forward_errors`, and the least cosine of bfloat16 and float32 embeddings, of this package and, under
      `PyTorch`, of the reference under PyTorch's autocast.
    """
    _, method, variables = pair("float32", form=form, **FULL_SIZE)
    x = normalised(batches(1, 384, 128)[0]["images"][[0, 2]], "float32")
    outputs = flax_forward(method, variables, x, train=False)
    in_half = dataclasses.replace(method, settings=replace(method.settings, {"dtype": "bfloat16"}))
    half = flax_forward(in_half, variables, x, train=False)
    expected, cosine = _expected_at_full_size()
    cosines = {"this package": min_cosine(half.embedding, outputs.embedding), "PyTorch": cosine}
    return output_errors(outputs, expected), cosines


FULL_SIZE = {"residual_scale": 0.3, "stage_sizes": (3, 4, 6, 3), "width": 64}


@functools.cache  # the same for both forms
def _expected_at_full_size() -> tuple[ReferenceOutputs, float]:
    """PyTorch's outputs in float64, and the least cosine of its bfloat16 and float32 embeddings."""
    network, _, _ = pair("float32", **FULL_SIZE)
    x = normalised(batches(1, 384, 128)[0]["images"][[0, 2]], "float32")
    network.eval()
    with torch.no_grad():
        single = network(x)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            single_half = network(x)
        expected = network.double()(x.double())
    return expected, min_cosine(single_half.embedding.float(), single.embedding)


# The blocks of torchvision's ResNets and how many of them the stages have, written down once more. ResNet-50 is
# compared elsewhere; ResNet-152 is ResNet-101 with more blocks.
BACKBONES = {
    "resnet18": (BasicBlock, (2, 2, 2, 2)),
    "resnet34": (BasicBlock, (3, 4, 6, 3)),
    "resnet101": (Bottleneck, (3, 4, 23, 3)),
}


def backbone_errors(name: str) -> dict[str, float]:
    """f, g and the pattern maps of MPANet on a backbone of that name, of full depth but narrow, evaluation, float64."""
    block_type, stage_sizes = BACKBONES[name]
    with jax.enable_x64(True):
        # Scaled down as in `full_size_errors`, where there are many blocks.
        options = {"stage_sizes": stage_sizes, "width": 16, "block_type": block_type}
        network = randomise(MPANet(NUM_IDS, **options).double(), 1).eval()
        with torch.no_grad():
            for parameter_name, parameter in network.named_parameters():
                if parameter_name.endswith("bn3.weight"):
                    parameter.mul_(0.3)
        fields = {"dtype": "float64", "model.backbone": name, "model.width": 16, "model.fused": "off"}
        method = Method(replace(MPANetSettings(), fields))
        variables, left_out = from_state_dict(
            numpy_state_dict(network), template_of(method, NUM_IDS), method.names(), source=name
        )
        assert all(entry.endswith("num_batches_tracked") for entry in left_out)
        x = normalised(batches(1, 64, 32)[0]["images"][[0, 2]], "float64")
        with torch.no_grad():
            expected = network(x)
        return output_errors(flax_forward(method, variables, x, train=False), expected)


def min_cosine(a: Any, b: Any) -> float:
    """The smallest cosine similarity between corresponding rows."""
    a, b = (np.asarray(x, np.float64) for x in (a, b))
    return float(((a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)).min())


def gradient_recorder() -> optax.GradientTransformation:
    """Passes gradients on and keeps the last ones as its state."""
    return optax.GradientTransformation(
        # NumPy's: JAX would compile one program for each shape.
        lambda params: jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), params),
        lambda gradients, _, params=None: (gradients, gradients),
    )


RATES = [3.5e-4, 3.5e-4, 3.5e-5, 3.5e-5, 3.5e-6]  # of five steps


def training_errors(
    preset: str,
    *,
    steps: int = 5,
    first_epoch: int = 1,
    center_cluster: bool = True,
    form: str = "plain",
    **options: Any,
) -> dict[str, dict[str, float]]:
    """Float64 errors over `steps` steps of the whole training step, augmentation off, a learning rate that changes.

    Returns:
      By name: `terms` (loss terms, the largest error over the steps), `gradients` (of the first step) and, after the
      last step, `batch norm statistics`. One step leaves the optimiser out; more than one also give `parameters`,
      `first moments`, `second moments` and `mean classifiers` after the last step.
    """
    fields = {**PRESETS[preset], "loss.center_cluster": float(center_cluster)}
    if not options.get("modality_learning", True):
        fields |= {"loss.modality_identity": 0.0, "loss.mutual_mean": 0.0}
    with jax.enable_x64(True):
        _, method, variables = pair("float64", form=form, fields=fields, **options)
        schedule = optax.piecewise_constant_schedule(RATES[0], {2: 0.1, 4: 0.1})
        chain = gradient_recorder()
        if steps > 1:
            chain = optax.chain(chain, adam(schedule, 5e-4))
        mean_rate = mean_rate_schedule(0.2, 100 if preset == "official" else 0, 1)
        method = dataclasses.replace(
            method, schedule=schedule, average=lambda count: mean_rate(count + first_epoch - 1), chain=chain
        )
        step, state = flax_step(method), flax_state(method, variables)
        expected = _expected_training(preset, steps, first_epoch, center_cluster, **options)

        errors: dict[str, dict[str, float]] = {"terms": {}}
        for number, (batch, terms) in enumerate(zip(batches(steps, 64, 32), expected.terms, strict=True)):
            state, metrics = step(state, batch)
            for name in terms.keys() & {name for name in TERMS if TERMS[name] in metrics}:
                error = relative_error(metrics[TERMS[name]], terms[name])
                errors["terms"][name] = max(error, errors["terms"].get(name, 0.0))
            if number == 0:
                recorded = state.opt_state if steps == 1 else state.opt_state[0]
                errors["gradients"] = _gradient_errors(expected.gradients, published(method, state, recorded))

        ours, theirs = published(method, state, state.params), expected.state_dict
        compared = {"batch norm statistics": [name for name in theirs if "running_" in name]}
        if steps > 1:
            compared["parameters"] = list(expected.gradients)
            compared["mean classifiers"] = [name for name in theirs if name.endswith("classifier_.weight")]
            of_adam = state.opt_state[1][1]
            for quantity, moment, key in (("first", of_adam.mu, "exp_avg"), ("second", of_adam.nu, "exp_avg_sq")):
                moment = published(method, state, moment)
                errors[f"{quantity} moments"] = {
                    name: relative_error(moment[name], of_parameter[key])
                    for name, of_parameter in expected.moments.items()
                }
        for quantity, names in compared.items():
            errors[quantity] = {name: relative_error(ours[name], theirs[name]) for name in names}
        return errors


@dataclass(frozen=True)
class ExpectedTraining:
    """What PyTorch's training came to.

    Attributes:
      terms: loss terms of each step.
      gradients: of the first step.
      state_dict: after the last step.
      moments: Adam's of each parameter, after the last step, under the names of PyTorch.
    """

    terms: list[dict[str, torch.Tensor]]
    gradients: dict[str, np.ndarray]
    state_dict: dict[str, np.ndarray]
    moments: dict[str, dict[str, torch.Tensor]]


@functools.cache  # the same for both forms
def _expected_training(
    preset: str, steps: int, first_epoch: int, center_cluster: bool, **options: Any
) -> ExpectedTraining:
    network, _, _ = pair("float64", **options)
    optimizer, all_terms, gradients = make_optimizer(network, RATES[0]), [], {}
    trained = {name: parameter for name, parameter in network.named_parameters() if parameter.requires_grad}
    for number, batch in enumerate(batches(steps, 64, 32)):
        terms = train_step(
            network,
            optimizer,
            normalised(batch["images"], "float64"),
            *_labels_and_modality(batch),
            preset=preset,
            epoch=first_epoch + number,
            learning_rate=RATES[number],
            center_cluster=center_cluster,
        )
        all_terms.append(terms)
        gradients = gradients or {name: parameter.grad.numpy().copy() for name, parameter in trained.items()}
    moments = {name: optimizer.state[parameter] for name, parameter in trained.items()}
    return ExpectedTraining(all_terms, gradients, numpy_state_dict(network), moments)


def flax_step(method: Method) -> Any:
    """The package's training step, compiled."""
    return jax.jit(
        partial(flax_train_step, method=method, network=method.build(NUM_IDS), steps_per_epoch=1),
        compiler_options={"xla_backend_optimization_level": "0"},  # compiled once, run a few times
    )


def flax_state(method: Method, variables: dict[str, Any]) -> TrainState:
    """The state before the first step, with the mean classifiers of `variables`."""
    variables = jax.tree.map(jnp.asarray, variables)
    optimizer = method.optimizer(method.learning_rate(1))
    return create_train_state(variables, variables["averages"], optimizer, jax.random.key(0))


def flax_gradients(batch: dict[str, np.ndarray], form: str = "plain") -> tuple[Any, dict[str, Any]]:
    """Gradients and metrics of one float32 step of the package on `batch`."""
    _, method, variables = pair("float32", form=form, stage_sizes=(0, 0, 1, 1))
    method = dataclasses.replace(method, chain=gradient_recorder())
    state, metrics = flax_step(method)(flax_state(method, variables), batch)
    return state.opt_state, metrics


def published(method: Method, state: Any, params: Any) -> dict[str, np.ndarray]:
    """A tree shaped like the parameters, with the state's statistics and mean classifiers, in the published names."""
    variables = {"params": params, "batch_stats": state.batch_stats, "averages": state.averages}
    return to_state_dict(variables, method.names())


def _gradient_errors(theirs: dict[str, np.ndarray], gradients: dict[str, np.ndarray]) -> dict[str, float]:
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


def rows(form: str) -> dict[tuple[str, str, str], float]:
    """(quantity, preset, precision) → the largest relative error, of the network in one form."""
    found: dict[tuple[str, str, str], float] = {}

    def add(quantity: str, preset: str, precision: str, errors: dict[str, float]) -> None:
        key = (quantity, preset, precision)
        found[key] = max(max(errors.values()), found.get(key, 0.0))

    for precision in ("float32", "float64"):
        for mode in ("evaluation", "training"):
            errors = forward_errors(precision, train=mode == "training", form=form)
            for quantity in [name for name in errors if "loss" not in name]:
                add(f"{quantity}, {mode}", "both", precision, {quantity: errors.pop(quantity)})
            for preset in PRESETS if errors else ():
                values = {name: error for name, error in errors.items() if name.endswith(preset)}
                add("loss terms", preset, precision, values)
    errors, cosines = full_size_errors(form)
    for quantity, error in errors.items():
        add(f"{quantity}, ResNet-50 at 384×128, evaluation", "both", "float32", {quantity: error})
    for preset in PRESETS:
        errors = training_errors(preset, first_epoch=139, form=form)
        add("gradient of each parameter", preset, "float64", errors.pop("gradients"))
        add("loss terms, five steps", preset, "float64", errors.pop("terms"))
        for quantity, values in errors.items():
            add(f"{quantity}, after five steps", preset, "float64", values)
    for options in VARIANTS.values():
        errors = training_errors("paper", steps=1, stage_sizes=(1, 1, 1, 1), form=form, **options)
        add("nine ablation variants: loss terms", "paper", "float64", errors["terms"])
        add("nine ablation variants: gradient of each parameter", "paper", "float64", errors["gradients"])
    add(
        "1 − cosine of embeddings with those in float32, ResNet-50 at 384×128",
        "both",
        "bfloat16",
        {"": 1 - cosines["this package"]},
    )
    add("the same of PyTorch under autocast", "both", "bfloat16", {"": 1 - cosines["PyTorch"]})
    return found


def table() -> str:
    """The largest relative error of each quantity, in both forms of the network, in Markdown."""
    plain, fused = rows("plain"), rows("fused")
    lines = ["| quantity | preset | precision | plain | fused |", "|---|---|---|---|---|"]
    lines += [f"| {' | '.join(key)} | {plain[key]:.1e} | {fused[key]:.1e} |" for key in plain]
    return "\n".join(lines)


PAGE = """# Parity with PyTorch

`tests/reference/` has an independent implementation of MPANet in PyTorch. The plain and the fused form of the network
are compared with it, from the same weights and batches. The table has the largest relative error ‖a − b‖ / ‖b‖, where b
is PyTorch's value. PyTorch computes in float64, so that its own rounding does not add to the errors. The networks are
small, with 1 or 2 blocks a stage and images of 128×64 or 64×32; evaluation is also compared for ResNet-50 at 384×128.
Augmentation is off.

{table}

If a gradient is 0 up to rounding (the bias of a layer before a batch norm), its error is relative to the norm of all
gradients. The nine ablation variants are {variants}.

`make test` checks these bounds for both forms (`tests/test_parity.py`): 1e-5 in float32; 1e-10 for values and 1e-8 for
gradients and five training steps in float64 (plain with the paper's losses, fused with the official ones, both at half
the width); in bfloat16 a cosine of at least 0.999, and 1 − cosine at most 1.5 times that of PyTorch. `tests/methods/`
checks AGW and CAJ in the same way ([methods](methods.md)).

## How this page is made

{made}

<!-- needs: minutes -->
```bash
python -m tests.reference.compare --markdown > docs/parity.md
```
"""


def page() -> str:
    """docs/parity.md: the table, what it was measured with, and how."""
    made = made_with()  # of the files as they are now
    *variants, baseline = VARIANTS
    listed = f"{', '.join(variants[:6])},\n{', '.join([*variants[6:], baseline])}"
    return PAGE.format(table=table(), variants=listed, made=made).rstrip("\n")


def made_with() -> str:
    """Date, versions, commit and machine, as a sentence."""
    today = f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d}"
    return (
        f"On {today}, commit {commit('mpanet_jax', 'tests/reference')}, Python {platform.python_version()}, "
        f"JAX {jax.__version__}, PyTorch {torch.__version__},\nNumPy {np.__version__}, "
        f"{os.cpu_count()} CPU cores ({processor()}), by"
    )


def main() -> None:
    """Prints the table, or the page."""
    parser = argparse.ArgumentParser(prog="python -m tests.reference.compare", description=__doc__)
    parser.add_argument("--markdown", action="store_true", help="print docs/parity.md, of which the table is a part")
    print(page() if parser.parse_args().markdown else table())


if __name__ == "__main__":
    main()
