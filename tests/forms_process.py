"""The plain and the fused network on this machine's device, each against the plain one in float64.

    JAX_ENABLE_X64=1 python -m tests.forms_process RESULT.json

For the branches that only an accelerator takes; the tests compare the two forms on the CPU. RESULT.json holds relative
errors ‖a − b‖ / ‖b‖ of the outputs, of all gradients together and of the running statistics.
"""

import json
import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from mpanet_jax.models.fused import fuse
from mpanet_jax.models.layers import SUMMED
from mpanet_jax.models.mpanet import MPANet
from mpanet_jax.models.resnet import Bottleneck, ResNet

BATCH, HEIGHT, WIDTH, NUM_IDS = 16, 192, 64, 16


def network(dtype, **options):
    wide = jnp.promote_types(dtype, jnp.float32)
    backbone = ResNet(Bottleneck, (1, 2, 2, 2))  # every kind of shortcut, at full width
    return MPANet(NUM_IDS, backbone, dtype=jnp.dtype(dtype), param_dtype=wide, **options)


def outputs_and_gradients(net, variables, images, modality):
    """Outputs in training, their gradients for a fixed direction, running statistics, and outputs in evaluation."""

    def loss(params):
        outputs, noted = net.apply(
            {**variables, "params": params}, images, modality, train=True, mutable=["batch_stats", SUMMED]
        )
        keys = jax.random.split(jax.random.key(7), len(outputs))
        directions = [jax.random.normal(k, o.shape, jnp.float32) for k, o in zip(keys, outputs, strict=True)]
        products = (jnp.vdot(o, d.astype(o.dtype)) / o.size for o, d in zip(outputs, directions, strict=True))
        return sum(products), (outputs, noted["batch_stats"])

    gradients, (outputs, statistics) = jax.jit(jax.grad(loss, has_aux=True))(variables["params"])
    evaluated = jax.jit(partial(net.apply, train=False))(variables, images, modality)
    found = {"outputs": outputs, "gradients": gradients, "running statistics": statistics, "evaluation": evaluated}
    return jax.tree.map(lambda a: np.asarray(a, np.float64), jax.device_get(found))


def whole_error(a, b):
    a, b = (np.concatenate([leaf.ravel() for leaf in jax.tree.leaves(tree)]) for tree in (a, b))
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


def worst_error(a, b):
    def error(x, y):
        return float(np.linalg.norm(x - y) / (np.linalg.norm(y) or 1))

    return max(jax.tree.leaves(jax.tree.map(error, a, b)))


def main(result):
    assert jax.config.jax_enable_x64, "JAX_ENABLE_X64=1 is needed"
    rng = np.random.default_rng(0)
    # Blobs, so that feature maps vary.
    images = np.kron(rng.normal(size=(BATCH, HEIGHT // 16, WIDTH // 16, 3)), np.ones((1, 16, 16, 1)))
    modality = np.arange(BATCH) % 2
    exact = network("float64")
    variables = jax.jit(partial(exact.init, train=False))(jax.random.key(0), images, modality)
    # As training leaves them: residual branches of moderate size.
    variables = jax.tree_util.tree_map_with_path(
        lambda path, a: a * 0.3 if "bn3" in jax.tree_util.keystr(path) and "scale" in jax.tree_util.keystr(path) else a,
        variables,
    )
    expected = outputs_and_gradients(exact, variables, images, modality)
    errors = {"device": jax.devices()[0].device_kind, "jax": jax.__version__}
    for dtype, precision in (("float64", "highest"), ("float32", "highest"), ("bfloat16", None)):
        narrow = jnp.promote_types(dtype, jnp.float32)
        cast = jax.tree.map(lambda a: jnp.asarray(a, narrow), (variables, images))  # noqa: B023 - used at once
        for form in ("plain", "fused"):
            net = network(dtype) if form == "plain" else fuse(network(dtype))
            with jax.default_matmul_precision(precision or "default"):
                found = outputs_and_gradients(net, *cast, modality)
            of = {name: whole_error(found[name], expected[name]) for name in expected}
            if dtype == "float64":
                of["worst gradient"] = worst_error(found["gradients"], expected["gradients"])
            errors[f"{dtype}, {form}"] = of
    result.write_text(json.dumps(errors, indent=1))
    print(json.dumps(errors, indent=1))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
