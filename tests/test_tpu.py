"""The step is lowered for a TPU, of which none is needed: what the program holds, not how fast it is."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import pytest

from mpanet_jax.data.pipeline import train_feed
from mpanet_jax.errors import SettingsError
from mpanet_jax.settings import DataSettings
from mpanet_jax.step import train_steps
from tests.data.toy import toy_plan, toy_split
from tests.methods_in_tests import small_mpanet, start

P, K, HEIGHT, WIDTH, STEPS = 4, 4, 64, 32, 2


def device_images():
    """The training images as the feed puts them on a device, here a description of them."""
    split, data = toy_split(), DataSettings(height=HEIGHT, width=WIDTH, cache="device")
    described = partial(train_feed, put_images=lambda images: jax.ShapeDtypeStruct(images.shape, images.dtype))
    return described(split, toy_plan(split), data, num_epochs=1).images


def program(monkeypatch, **fields):
    """The StableHLO of two steps for a TPU."""
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    method = small_mpanet(data__images_per_id=K, **fields)
    state = jax.eval_shape(partial(start, method, P, HEIGHT, WIDTH))
    rows = jax.ShapeDtypeStruct((STEPS, P * K), jnp.int32)
    batches = {"labels": rows, "modality": rows, "index": rows}
    images = device_images()
    options = {"method": method, "network": method.build(P), "steps_per_epoch": 10}
    steps = jax.jit(partial(train_steps, **options))
    return jax.export.export(steps, platforms=["tpu"])(state, batches, images).mlir_module()


def operands_of_reductions(module):
    """How many arrays each reduction reduces at once."""
    return [call.count(" init:") for call in re.findall(r"stablehlo\.reduce\((.*?)(?: across|\) )", module)]


@pytest.mark.parametrize("fused", ["auto", "on"])
def test_tpu_gets_no_reduction_of_two_operands_and_no_float64(fused, monkeypatch):
    module = program(monkeypatch, model__fused=fused)
    found = operands_of_reductions(module)
    assert len(found) > 50 and set(found) == {1}
    assert not re.search(r"tensor<[^>]*f64>", module)
    assert "bf16" in module  # what 'auto' is on an accelerator


def test_no_image_in_a_tpus_memory_has_an_axis_of_3_at_its_end(monkeypatch):
    # The last axis is padded to 128 there: a cache of 4.7 GiB would take 200.
    arguments = re.search(r"func\.func public @main\((.*?)\) ->", program(monkeypatch), re.S)[1]
    bytes_of_images = re.findall(r"tensor<([\dx]+)xui8>", arguments)
    assert bytes_of_images == [f"{len(toy_split())}x{HEIGHT}x{WIDTH * 3}"]


def test_float32_is_float32_on_a_tpu(monkeypatch):
    module = program(monkeypatch, dtype="float32")
    products = re.findall(r"stablehlo\.(?:dot_general|convolution).*", module)
    assert len(products) > 50 and all("HIGHEST" in line and "DEFAULT" not in line for line in products)


def test_float64_is_refused_on_a_tpu(monkeypatch):
    with pytest.raises(SettingsError, match="float64"):
        program(monkeypatch, dtype="float64")


def test_the_gpu_keeps_its_reductions_of_two_operands(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    from mpanet_jax.models.fused.batch_norm import channel_sums

    x = jax.ShapeDtypeStruct((4, 8), jnp.float32)
    module = jax.export.export(jax.jit(channel_sums), platforms=["cuda"])(x, x).mlir_module()
    assert 2 in operands_of_reductions(module)
