"""AGW and CAJ against PyTorch; their batches, views, stems and settings."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")

from mpanet_jax.data.augment import normalize  # noqa: E402
from mpanet_jax.errors import SettingsError, UserError  # noqa: E402
from mpanet_jax.methods import make_method, settings_of  # noqa: E402
from mpanet_jax.methods.agw import AGW, AGWSettings, RandomBatchPlan  # noqa: E402
from mpanet_jax.methods.caj import CAJ, CAJSettings  # noqa: E402
from mpanet_jax.settings_base import replace, to_dict  # noqa: E402
from mpanet_jax.state import create_train_state  # noqa: E402
from mpanet_jax.step import train_step  # noqa: E402
from mpanet_jax.weights.convert import template_of  # noqa: E402
from mpanet_jax.weights.names import from_state_dict, to_state_dict  # noqa: E402
from tests.methods_in_tests import start  # noqa: E402
from tests.reference import agw as reference  # noqa: E402
from tests.reference import speed  # noqa: E402
from tests.reference.compare import (  # noqa: E402
    FORMS,
    IMAGES_PER_ID,
    NUM_IDS,
    batches,
    gradient_recorder,
    normalised,
    numpy_state_dict,
    relative_error,
)
from tests.reference.model import randomise  # noqa: E402
from tests.reference.resnet import ResNet  # noqa: E402

# Stage 3 has a block with a plain shortcut, and two non-local blocks.
STAGE_SIZES = (1, 1, 2, 1)
TINY = {"model.stage_sizes": STAGE_SIZES, "model.width": 8, "data.images_per_id": IMAGES_PER_ID}
STILL = {"augment.flip_probability": 0.0, "augment.crop_padding": 0, "augment.erase_probability": 0.0}
RATES = [0.01, 0.02, 0.02, 0.002, 0.002]
# Zero but for rounding: a batch norm takes them out again.
ZERO = ("W.0.bias", "NL_2.0.W.1.bias", "NL_3.1.W.1.bias")
SETTINGS = {"agw": AGWSettings, "caj": CAJSettings}


def small(name, **fields):
    return make_method(
        replace(SETTINGS[name](), {**TINY, **STILL, **{k.replace("__", "."): v for k, v in fields.items()}})
    )


def compared(method):
    """The method with RATES, a record of its gradients, and, for CAJ, the first channel in the second views."""

    class Compared(type(method)):
        def learning_rate(self, steps_per_epoch):
            return lambda step: jnp.asarray(RATES)[step]

        def optimizer(self, learning_rate):
            import optax

            return optax.chain(gradient_recorder(), super().optimizer(learning_rate))

        def views(self, key, images, rows, first_index):
            images = normalize(images, jnp.float64)
            if not isinstance(self, CAJ):
                return images, rows
            visible = np.flatnonzero(np.arange(len(images)) % IMAGES_PER_ID < IMAGES_PER_ID // 2)
            second = jnp.broadcast_to(images[visible][..., :1], images[visible].shape)
            return jnp.concatenate([images, second]), {n: jnp.concatenate([r, r[visible]]) for n, r in rows.items()}

    return Compared(method.settings)


def torch_step(name, network, optimizer, batch, rate):
    """One step of the reference, with the same views."""
    network.train()
    optimizer.zero_grad()
    reference.set_rate(optimizer, rate)
    x, labels = normalised(batch["images"], "float64"), torch.from_numpy(batch["labels"]).long()
    is_visible = torch.from_numpy(batch["modality"] == 0)
    visible, infrared = x[is_visible], x[~is_visible]
    labels = [labels[is_visible], labels[~is_visible]]
    if name == "caj":
        visible = torch.cat([visible, visible[:, :1].expand_as(visible)])
        labels.insert(0, labels[0])
    labels = torch.cat(labels)
    pooled, _, logits = network(visible, infrared)
    identity = torch.nn.functional.cross_entropy(logits, labels)
    triplet = (reference.triplet if name == "agw" else reference.squared_difference)(pooled, labels)
    (identity + triplet).backward()
    optimizer.step()
    return {"identity": identity, "triplet": triplet, "loss": identity + triplet}


# Both have the same network. The plain one of AGW is compared with the published program in test_golden.py.
@pytest.mark.parametrize(("name", "form"), [("agw", "fused"), ("caj", "plain")])
def test_five_training_steps_in_float64(name, form):
    with jax.enable_x64(True):
        network = randomise(reference.AGW(NUM_IDS, stage_sizes=STAGE_SIZES, width=8).double(), 1)
        method = compared(small(name, dtype="float64", model__fused=FORMS[form]))
        variables, left_out = from_state_dict(numpy_state_dict(network), template_of(method, NUM_IDS), method.names())
        assert all(entry.endswith("num_batches_tracked") for entry in left_out)
        optimizer = method.optimizer(method.learning_rate(1))
        create = jax.jit(lambda variables, key: create_train_state(variables, {}, optimizer, key))
        state = create(variables, jax.random.key(0))
        options = {"method": method, "network": method.build(NUM_IDS), "steps_per_epoch": 1}
        step = jax.jit(partial(train_step, **options))
        theirs = reference.make_optimizer(network, RATES[0])

        def ours(params):
            variables = {"params": params, "batch_stats": state.batch_stats, "averages": {}}
            return to_state_dict(variables, method.names())

        for number, batch in enumerate(batches(5, 64, 32)):
            terms = torch_step(name, network, theirs, batch, RATES[number])
            state, metrics = step(state, batch)
            for term, value in terms.items():
                assert relative_error(metrics[term], value) < 1e-9, (number, term)
            if number == 0:
                gradients = ours(state.opt_state[0])
                whole = sum(float(np.square(g).sum()) for g in gradients.values()) ** 0.5
                for entry, parameter in network.named_parameters():
                    if not parameter.requires_grad:
                        continue
                    if entry.endswith(ZERO):
                        assert np.linalg.norm(gradients[entry]) < 1e-9 * whole, entry
                    else:
                        assert relative_error(gradients[entry], parameter.grad) < 1e-8, entry
        found = ours(state.params)
        for entry, value in network.state_dict().items():
            if not entry.endswith("num_batches_tracked"):
                assert relative_error(found[entry], value) < 1e-8, entry


def test_evaluation_takes_each_images_own_stem_whatever_the_mixture():
    network = randomise(reference.AGW(NUM_IDS, stage_sizes=STAGE_SIZES, width=8).double(), 1).eval()
    batch = batches(1, 64, 32)[0]
    x, is_visible = normalised(batch["images"], "float64"), batch["modality"] == 0
    with torch.no_grad():
        expected = network(x[torch.from_numpy(is_visible)], x[torch.from_numpy(~is_visible)])[1].numpy()
    with jax.enable_x64(True):
        method = small("agw", dtype="float64", model__fused="off")
        variables, _ = from_state_dict(numpy_state_dict(network), template_of(method, NUM_IDS), method.names())
        embed = jax.jit(partial(method.embed, method.build(NUM_IDS)))
        found = np.asarray(embed(variables, batch["images"], batch["modality"]))
        expected = expected / np.linalg.norm(expected, axis=1, keepdims=True)
        assert relative_error(found[is_visible], expected[: is_visible.sum()]) < 1e-10
        assert relative_error(found[~is_visible], expected[is_visible.sum() :]) < 1e-10
        # With eval.flip: the mean of the unit embeddings of image and mirror image, at unit length.
        flipping = make_method(replace(method.settings, {"eval.flip": True}))
        mirrored = np.asarray(embed(variables, batch["images"][:, :, ::-1], batch["modality"]))
        mean = found + mirrored
        both = jax.jit(partial(flipping.embed, method.build(NUM_IDS)))(variables, batch["images"], batch["modality"])
        assert relative_error(both, mean / np.linalg.norm(mean, axis=1, keepdims=True)) < 1e-10


def test_both_stems_start_as_the_one_of_a_backbone():
    backbone = numpy_state_dict(ResNet(STAGE_SIZES, 8))
    backbone["fc.weight"] = np.zeros((10, 256), np.float32)
    method = small("agw")
    variables, _ = from_state_dict(backbone, template_of(method, NUM_IDS), method.names())
    params = variables["params"]
    assert set(params) == {"visible", "infrared", "stage1", "stage2", "stage3", "stage4"}
    for stem in ("visible", "infrared"):
        kernel = params[stem]["stem"]["conv1"]["kernel"]
        np.testing.assert_array_equal(kernel, backbone["conv1.weight"].transpose(2, 3, 1, 0))
        np.testing.assert_array_equal(variables["batch_stats"][stem]["stem"]["bn1"]["var"], backbone["bn1.running_var"])


def test_published_checkpoints_have_more_than_is_used():
    network = reference.AGW(NUM_IDS, stage_sizes=STAGE_SIZES, width=8)
    unused = {f"visible_module.visible.{name}": v for name, v in numpy_state_dict(ResNet(STAGE_SIZES, 8)).items()}
    unused |= {name.replace("visible", "thermal"): value for name, value in unused.items()}
    unused["base_resnet.base.conv1.weight"] = unused["base_resnet.base.fc.weight"] = np.zeros((8, 3, 7, 7))
    used = numpy_state_dict(network)
    method = small("agw")
    template = template_of(method, NUM_IDS)
    variables, left_out = from_state_dict({**unused, **used}, template, method.names())
    assert set(unused) - set(used) <= set(left_out)
    again = to_state_dict(variables, method.names())
    for name, array in used.items():
        if not name.endswith("num_batches_tracked"):
            np.testing.assert_array_equal(again[name], array)
    with pytest.raises(UserError, match=r"missing: .*NL_3\.1\.theta\.weight"):
        from_state_dict({n: a for n, a in used.items() if not n.startswith("NL_3.1")}, template, method.names())


def test_batches_are_random_identities_with_random_images():
    pids = np.concatenate([np.repeat(np.arange(12), 9), np.repeat(np.arange(12), 3)])
    modality = np.repeat([0, 1], (108, 36)).astype(np.int32)
    plan = AGW(replace(AGWSettings(), {"seed": 3})).batch_plan(pids, modality, 8)
    assert type(plan) is RandomBatchPlan and plan.steps_per_epoch == 108 // 32 + 1
    epoch = plan.epoch(0)
    assert epoch.shape == (4, 64) and epoch.dtype == np.int32
    drawn = pids[epoch].reshape(4, 8, 8)
    assert (drawn == drawn[..., :1]).all()
    assert all(len(set(batch[:, 0])) == 8 for batch in drawn)
    np.testing.assert_array_equal(
        modality[epoch].reshape(4, 8, 8), np.broadcast_to([0, 0, 0, 0, 1, 1, 1, 1], (4, 8, 8))
    )
    assert (plan.epoch(1) != epoch).any()
    other = RandomBatchPlan(pids, modality, 8, 8, 3)
    np.testing.assert_array_equal(other.epoch(1), plan.epoch(1))
    # With replacement, uniformly: each of 9 images 4 · 8/12 · 4/9 times an epoch.
    counts = np.bincount(np.concatenate([other.epoch(e).ravel() for e in range(300)]), minlength=144)
    assert abs(counts[:108].mean() - 300 * 4 * 8 / 12 * 4 / 9) < 1e-9
    assert counts[:108].std() < 2 * counts[:108].mean() ** 0.5
    with pytest.raises(UserError, match="num_ids_per_batch = 13"):
        AGW(AGWSettings()).batch_plan(pids, modality, 13)


def test_caj_views():
    method = small("caj", data__height=32, data__width=16)
    pairs, size = 40, 4
    generator = np.random.default_rng(0)
    images = jnp.asarray(generator.integers(0, 256, (pairs * size, 32, 16, 3), np.uint8))
    rows = {
        "labels": np.repeat(np.arange(pairs), size).astype(np.int32),
        "modality": np.tile([0, 0, 1, 1], pairs).astype(np.int32),
    }
    rows = jax.tree.map(jnp.asarray, rows)
    views, seen = jax.jit(lambda key: method.views(key, images, rows, 0))(jax.random.key(0))
    assert views.shape == (pairs * 6, 32, 16, 3)
    plain = np.asarray(normalize(images, jnp.float32))
    visible = np.asarray(rows["modality"]) == 0
    np.testing.assert_array_equal(views[: len(images)][visible], plain[visible])
    np.testing.assert_array_equal(seen["labels"], np.concatenate([rows["labels"], rows["labels"][visible]]))
    np.testing.assert_array_equal(seen["modality"], np.concatenate([rows["modality"], np.zeros(2 * pairs)]))

    def kinds(found, source):
        """By image: the channel that is in all of them, 3 for grey, 4 for unchanged."""
        grey = (source * (0.2989, 0.587, 0.114)).sum(-1, keepdims=True)
        forms = [np.broadcast_to(source[..., c : c + 1], source.shape) for c in range(3)]
        forms += [np.broadcast_to(grey, source.shape), source]
        errors = np.stack([np.abs(found - form).max((1, 2, 3)) for form in forms])
        assert (errors.min(0) < 1e-5).all()
        return np.bincount(errors.argmin(0), minlength=5) / len(found)

    second = kinds(np.asarray(views[len(images) :]), plain[visible])
    np.testing.assert_allclose(second, [1 / 3, 1 / 3, 1 / 3, 0, 0], atol=5 * np.sqrt(2 / 9 / (2 * pairs)))
    infrared = kinds(np.asarray(views[: len(images)][~visible]), plain[~visible])
    np.testing.assert_allclose(infrared, [1 / 12, 1 / 12, 1 / 12, 0.375, 0.375], atol=5 * np.sqrt(0.25 / (2 * pairs)))
    # Each view has a crop of its own.
    moving = small("caj", augment__crop_padding=4)
    views, _ = jax.jit(lambda key: moving.views(key, images, rows, 0))(jax.random.key(0))
    first, second = np.asarray(views[: len(images)][visible]), np.asarray(views[len(images) :])
    same = np.abs(first[..., None, :] - second[..., :1, None]).max((1, 2, 3)).min(-1) < 1e-5
    assert same.mean() < 0.1
    # On two devices as on one.
    half = pairs * size // 2
    views_of_half = jax.jit(moving.views)
    parts = [
        views_of_half(jax.random.key(0), images[p], {n: r[p] for n, r in rows.items()}, jnp.asarray(p.start))
        for p in (slice(0, half), slice(half, 2 * half))
    ]
    np.testing.assert_allclose(views[:half], parts[0][0][:half], atol=1e-6)
    np.testing.assert_allclose(views[half : 2 * half], parts[1][0][:half], atol=1e-6)
    np.testing.assert_allclose(second[pairs:], parts[1][0][half:], atol=1e-6)


def test_the_loss_that_pytorchs_speed_is_measured_with_is_the_loss():
    features = torch.randn(16, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(4).repeat_interleave(4)
    torch.testing.assert_close(speed.triplet(features, labels), reference.triplet(features, labels))


@pytest.mark.parametrize("name", SETTINGS)
def test_it_learns(name):
    # Of two identities that differ in brightness; without warm-up, at a rate that CAJ does not run away at.
    fields = {"optim__learning_rate": 0.003, "optim__warmup_epochs": 0, "data__num_ids_per_batch": 2}
    method = small(name, model__stage_sizes=(1, 1, 1, 1), **fields)
    rng = np.random.default_rng(0)
    base = np.repeat([60, 190], IMAGES_PER_ID)[:, None, None, None]
    images = np.clip(base + rng.normal(0, 20, (2 * IMAGES_PER_ID, 32, 16, 3)), 0, 255).astype(np.uint8)
    batch = {
        "images": images,
        "labels": np.repeat([0, 1], IMAGES_PER_ID).astype(np.int32),
        "modality": np.tile([0, 0, 1, 1], 2).astype(np.int32),
    }
    step = jax.jit(partial(train_step, method=method, network=method.build(2), steps_per_epoch=100))
    state, losses = start(method, 2, 32, 16), []
    for _ in range(30):
        state, metrics = step(state, batch)
        losses.append(float(metrics["loss"]))
    assert np.isfinite(losses).all() and losses[-1] < 0.7 * losses[0]


@pytest.mark.parametrize("name", SETTINGS)
def test_settings_survive_plain_values_and_refuse_those_of_other_methods(name):
    settings = SETTINGS[name]()
    assert settings_of(to_dict(settings)) == settings == settings_of({"method": name})
    assert (settings.data.height, settings.data.width, settings.data.resize) == (288, 144, "lanczos")
    with pytest.raises(SettingsError, match=r"^mean: unknown field"):
        settings_of({"method": name, "mean": {"rate": 0.2}})
    with pytest.raises(SettingsError, match=r"^model\.channel_module: unknown field"):
        settings_of({"method": name, "model": {"channel_module": "mam"}})
    with pytest.raises(SettingsError, match=r"^loss\.identity = 0.0: both weights"):
        replace(settings, {"loss.identity": 0.0, "loss.triplet": 0.0})
