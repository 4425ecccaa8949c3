"""The same three steps on one device and on several, in a process of its own.

    JAX_ENABLE_X64=1 python -m tests.parallel_process RESULT.json                  # two, four or eight accelerators
    JAX_ENABLE_X64=1 XLA_FLAGS=--xla_force_host_platform_device_count=8 JAX_PLATFORMS=cpu \\
        python -m tests.parallel_process RESULT.json                               # eight CPU devices, as the tests do

RESULT.json maps a case to the greatest deviation from one device, for every part of the state and for the metrics.
"""

import gc
import json
import sys
from functools import cache, partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from mpanet_jax.data.sent_images import SentImage, pack
from mpanet_jax.device_resize import DeviceResize, _resize
from mpanet_jax.methods.agw import AGW, AGWSettings
from mpanet_jax.methods.caj import CAJ, CAJSettings
from mpanet_jax.methods.mpanet import MPANetSettings
from mpanet_jax.models.fused.classifier import linear
from mpanet_jax.parallel import Parallel, local_devices, on_first_device
from mpanet_jax.settings import DataSettings, Settings
from mpanet_jax.settings_base import replace
from mpanet_jax.step import train_steps
from tests.methods_in_tests import OFFICIAL, LinenMethod, MPANetOfTwoBlocks, TwoBlocks, start

P, K, HEIGHT, WIDTH, STEPS, NUM_IMAGES = 8, 4, 48, 24, 3, 60
COMMON = {
    "dtype": "float64",
    "data.images_per_id": K,
    "optim.milestones": (2,),
}
# The narrowest at which the masks of the channels, a sixteenth of them wide, still have several.
NARROW = {**COMMON, "model.width": 4}
# The non-local block has a batch norm of its own, whose scale starts at 0.
ABLATION = {"loss.separation": 0.0, "model.channel_module": "cbam", "model.pattern_module": "non_local"}
BASELINE = {"loss.separation": 0.0, "model.channel_module": "none", "model.pattern_module": "none"}


class AGWOfTwoBlocks(TwoBlocks, AGW):
    """AGW's."""


class CAJOfTwoBlocks(TwoBlocks, CAJ):
    """CAJ's."""


def _mpanet(form, **fields):
    return MPANetOfTwoBlocks(replace(MPANetSettings(), {**NARROW, "model.fused": form, **fields}))


METHODS = {
    "paper": _mpanet("on"),
    "paper, plain": _mpanet("off"),
    "ablation": _mpanet("on", **ABLATION),
    "ablation, plain": _mpanet("off", **ABLATION),
    "baseline": _mpanet("on", **BASELINE),
    "SE": _mpanet("on", **{"model.channel_module": "se"}),
    "IN": _mpanet("on", **{"model.channel_module": "in"}),
    "official": _mpanet("on", **OFFICIAL, **{"augment.crop_padding": 3}),
    "AGW": AGWOfTwoBlocks(replace(AGWSettings(), {**NARROW, "model.fused": "on"})),
    # Its squared differences are large, and so are their gradients and what rounding leaves of them.
    "CAJ, plain": CAJOfTwoBlocks(replace(CAJSettings(), {**NARROW, "model.fused": "off", "loss.triplet": 0.1})),
    # Layers that know nothing of this package.
    "flax.linen": LinenMethod(replace(Settings(), COMMON)),
}
# With IN in MAM's place the global part of the feature is 0 but for rounding, for instance-normalised maps have mean 0.
# Adam divides what that rounding makes of a gradient by its size, so from step to step less is well defined. The first
# step is: its losses, its gradients (in opt_state) and what it makes of the parameters.
STEPS_OF = {"IN": 1}
# What a module computes is the same in both forms (tests/models/fused), so that of its devices is tested in one.
# method, devices (as many as there are, if fewer), mapping, all steps in one call, images on the devices
CASES = [
    ("paper", 4, "pmap", False, False),
    ("paper", 4, "shard_map", True, True),
    ("paper, plain", 4, "pmap", False, True),
    ("official", 4, "shard_map", False, True),
    ("ablation", 4, "shard_map", True, True),
    ("ablation, plain", 4, "shard_map", False, True),
    ("baseline", 4, "pmap", False, True),
    ("SE", 4, "shard_map", False, True),
    ("IN", 4, "pmap", False, True),
    ("AGW", 4, "pmap", False, True),
    ("CAJ, plain", 4, "shard_map", True, True),
    ("flax.linen", 2, "pmap", True, False),
    ("flax.linen", 4, "shard_map", True, False),
    ("paper", 8, "pmap", True, True),  # the last: its network makes the embeddings
]


def make_batches(images_on_device):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, size=(NUM_IMAGES, HEIGHT, WIDTH, 3), dtype=np.uint8)
    index = rng.integers(0, NUM_IMAGES, size=(STEPS, P * K)).astype(np.int32)
    batches = {
        "labels": np.stack([np.repeat(rng.permutation(P + 2)[:P], K) for _ in range(STEPS)]).astype(np.int32),
        "modality": np.tile([0, 0, 1, 1], (STEPS, P)).astype(np.int32),
        "index": index,
    }
    if images_on_device:
        return batches, images.reshape(NUM_IMAGES, HEIGHT, WIDTH * 3)
    return batches | {"images": images[index]}, None


@cache
def initial_state(name):
    return start(METHODS[name], P + 2, HEIGHT, WIDTH, steps_per_epoch=1)


def run(name, parallel, in_one_call, images_on_device):
    method = METHODS[name]
    network = method.build(P + 2, parallel.axis_name)
    options = {"method": method, "network": network, "steps_per_epoch": 1, "axis_name": parallel.axis_name}
    mapped = parallel.map_steps(partial(train_steps, **options))
    batches, images = make_batches(images_on_device)
    steps = STEPS_OF.get(name, STEPS)
    state = parallel.replicate(jax.tree.map(jnp.copy, initial_state(name)))  # donated
    images = None if images is None else parallel.replicate(images)
    metrics = []
    for rows in [slice(0, steps)] if in_one_call else [slice(i, i + 1) for i in range(steps)]:
        before = state
        state, taken = mapped(state, {name: value[rows] for name, value in batches.items()}, images)
        metrics.append(jax.device_get(taken))
        assert jax.tree.leaves(before.params)[0].is_deleted()  # donated
    for leaf in jax.tree.leaves(state.params):
        copies = [np.asarray(shard.data) for shard in leaf.addressable_shards]
        assert len(copies) == parallel.num_devices
        assert all((copy == copies[0]).all() for copy in copies)
    parts = {name: getattr(state, name) for name in ("params", "batch_stats", "opt_state", "averages")}
    parts["metrics"] = {name: np.concatenate([taken[name] for taken in metrics]) for name in metrics[0]}
    return {name: jax.device_get(part) for name, part in parts.items()}, state


def deviation(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    return max(jax.tree.leaves(jax.tree.map(lambda x, y: float(np.abs(x - y).max()), a, b)), default=0.0)


def case_name(name, count, mapping, in_one_call, images_on_device):
    calls = "one step" if name in STEPS_OF else "in one call" if in_one_call else "in three calls"
    images = "there" if images_on_device else "sent"
    return f"{name}, {count} by {mapping}, {calls}, images {images}"


def classifier_gradients(parallel, num_ids, dtype):
    """Logits, the kernel's gradient and the embeddings' of a classifier that is mapped over the devices."""
    rng = np.random.default_rng(0)
    embedding, kernel, weights = (rng.standard_normal(s) for s in ((16, 6), (6, num_ids), (16, num_ids)))

    def gradients(kernel, rows):
        def share(kernel, embedding):
            logits = linear(embedding, kernel, dtype, parallel.axis_name)
            return (jnp.tanh(logits) * rows["weights"]).sum(), logits

        (d_kernel, d_embedding), logits = jax.grad(share, (0, 1), has_aux=True)(kernel, rows["embedding"])
        # One row for each device: they have to agree.
        return {"logits": logits, "d_embedding": d_embedding, "d_kernel": d_kernel[None]}

    found = jax.device_get(
        parallel.map_rows(gradients)(parallel.replicate(kernel), {"embedding": embedding, "weights": weights})
    )
    copies = found["d_kernel"]
    assert len(copies) == parallel.num_devices and (copies == copies[0]).all()
    return found | {"d_kernel": copies[0]}


def misplaced_images(devices, mapping):
    """How far the images that several devices resize are from those of one, as the mapped functions see them."""
    rng = np.random.default_rng(4)
    sizes = rng.integers(1, (2 * HEIGHT, 2 * WIDTH), (STEPS, P * K, 2))
    drawn = [[SentImage.of(rng.integers(0, 256, (*size, 3), np.uint8)) for size in step] for step in sizes]
    pixels = [pack(images)["pixels"] for images in drawn]
    data = DataSettings(HEIGHT, WIDTH)
    one, many = (
        DeviceResize.of(data, parallel)({"pixels": pixels, "sizes": sizes})["images"]
        for parallel in (Parallel(devices[:1]), Parallel(devices, mapping))
    )
    expected = Parallel(devices, mapping)._split_rows(np.asarray(one))
    assert many.shape == expected.shape and many.sharding == expected.sharding
    compiled = _resize._cache_size()
    again = DeviceResize.of(data, Parallel(devices, mapping))({"pixels": pixels[:1], "sizes": sizes[:1]})["images"]
    np.testing.assert_array_equal(np.asarray(again).reshape(one[:1].shape), one[:1])
    assert _resize._cache_size() == compiled
    of_one_step = {"pixels": pixels[0], "sizes": sizes[0]}
    rows = local_devices().map_rows(lambda _, images: images)(
        None, DeviceResize.of(data, local_devices())(of_one_step)["images"]
    )
    np.testing.assert_array_equal(rows, one[0])
    return float(np.abs(np.asarray(expected).astype(int) - np.asarray(many)).max())


def main(result):
    gc.set_threshold(100_000, 20, 100)  # as tests/conftest.py does
    gc.freeze()
    devices = tuple(jax.devices())
    assert len(devices) in (2, 4, 8) and jax.config.jax_enable_x64, "2, 4 or 8 devices and JAX_ENABLE_X64=1 are needed"
    expected = {name: run(name, Parallel(devices[:1]), False, False)[0] for name in METHODS}
    with_both_forms = [name for name in METHODS if f"{name}, plain" in METHODS]
    # What a deviation is measured against: how far training went.
    deviations = {
        "paper against official": {"params": deviation(*(expected[name]["params"] for name in ("paper", "official")))},
        "plain against fused": {
            part: max(deviation(expected[name][part], expected[f"{name}, plain"][part]) for name in with_both_forms)
            for part in expected["paper"]
        },
    }
    for name, count, mapping, in_one_call, images_on_device in CASES:
        parallel = Parallel(devices[:count], mapping)
        found, state = run(name, parallel, in_one_call, images_on_device)
        deviations[case_name(name, parallel.num_devices, mapping, in_one_call, images_on_device)] = {
            part: deviation(expected[name][part], found[part]) for part in expected[name]
        }
    variables = on_first_device({"params": state.params, "batch_stats": state.batch_stats})
    images = make_batches(True)[1][:16].reshape(-1, HEIGHT, WIDTH, 3)
    method, local = METHODS["paper"], local_devices()
    network = method.build(P + 2)
    embed = local.map_rows(lambda variables, images: method.embed(network, variables, images))
    on_all = embed(local.replicate(variables), images)
    assert on_all.sharding.device_set == set(devices)
    on_one = jax.jit(partial(method.embed, network))(variables, images)
    deviations["embeddings"] = {"embeddings": deviation(jax.device_get(on_one), jax.device_get(on_all))}
    deviations["resized images"] = {
        mapping: misplaced_images(devices[:4], mapping) for mapping in ("pmap", "shard_map")
    }
    for num_ids, way in ((2, "summed"), (40, "product of all")):
        for dtype in (jnp.float64, jnp.bfloat16):
            one, all_ = (classifier_gradients(Parallel(d, "shard_map"), num_ids, dtype) for d in (devices[:1], devices))
            deviations[f"classifier, {way}, {dtype.__name__}"] = {
                name: deviation(one[name], all_[name]) for name in one
            }
    result.write_text(json.dumps(deviations, indent=1))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
