"""`Model`: held to the PyTorch network on pixels that Pillow alone has resized."""

import hashlib
import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

torch = pytest.importorskip("torch")

from mpanet_jax.errors import ArgumentError, UserError  # noqa: E402
from mpanet_jax.methods import make_method  # noqa: E402
from mpanet_jax.methods.agw import AGWSettings  # noqa: E402
from mpanet_jax.methods.mpanet import MPANetSettings  # noqa: E402
from mpanet_jax.model import Model, load  # noqa: E402
from mpanet_jax.settings_base import replace, to_dict  # noqa: E402
from mpanet_jax.weights.convert import convert, initial_variables, template_of  # noqa: E402
from mpanet_jax.weights.files import write_state_dict  # noqa: E402
from tests.reference.model import MPANet, randomise  # noqa: E402

SIZE = {"stage_sizes": (1, 1, 1, 1), "width": 8}
HEIGHT, WIDTH = 128, 64
SMALL = {
    **{f"model.{name}": value for name, value in SIZE.items()},
    **{"data.height": HEIGHT, "data.width": WIDTH, "dtype": "float32", "init_from": ""},
}
SETTINGS = MPANetSettings().replace({**SMALL, "dataset.source": "/home/somebody/SYSU-MM01", "dataset.data_dir": "/d"})
FIGURES = ("rank1", "rank5", "rank10", "rank20", "mAP", "mINP")
METRICS = {
    "sysu/all/single": {
        **{name: 10.25 + place for place, name in enumerate(FIGURES)},
        "std": dict.fromkeys(FIGURES, 1.5),
        **{"rerank": False, "metric": "cosine", "cmc": "identity", "trials": 10, "protocol": "sysu_mm01"},
        **{"num_query": 20, "num_query_without_match": 1, "num_gallery": 30, "checkpoint": "last", "step": 0},
    }
}


@pytest.fixture(scope="module")
def network():
    return randomise(MPANet(5, **SIZE), 0).eval()


@pytest.fixture(scope="module")
def workdir(network, tmp_path_factory):
    """A run's folder with the PyTorch network's weights."""
    folder = tmp_path_factory.mktemp("runs")
    state_dict = {name: value.detach().numpy().copy() for name, value in network.state_dict().items()}
    write_state_dict(folder / "published.safetensors", state_dict)
    convert(folder / "published.safetensors", folder / "run", settings=SETTINGS)
    (folder / "run/metrics.json").write_text(json.dumps(METRICS))
    return folder / "run"


@pytest.fixture(scope="module")
def model(workdir):
    return load(workdir)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Files of several kinds and sizes."""
    folder, generator = tmp_path_factory.mktemp("images"), np.random.default_rng(0)

    def draw(name, *shape, **options):
        Image.fromarray(generator.integers(0, 256, shape, dtype=np.uint8)).save(folder / name, **options)
        return folder / name

    return [
        draw("a.png", 200, 90, 3),
        draw("b.jpg", 131, 47, 3, quality=95),
        draw("c.png", 64, 32),
        draw("d.bmp", HEIGHT, WIDTH, 3),
    ]


def by_pytorch(network, files):
    """The outputs for images as Pillow opens and resizes them."""
    pixels = np.stack([np.asarray(Image.open(file).convert("RGB").resize((WIDTH, HEIGHT), 2)) for file in files])
    normalised = (pixels / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    with torch.no_grad():
        return network(torch.tensor(normalised.transpose(0, 3, 1, 2), dtype=torch.float32))


def difference(found, expected):
    return np.linalg.norm(found - expected) / np.linalg.norm(expected)


def test_embeddings_are_pytorchs(model, network, files):
    expected = by_pytorch(network, files).embedding.numpy()
    found = model.embed(files, normalize=False)
    assert found.dtype == np.float32 and found.shape == (4, model.size) == (4, expected.shape[1])
    assert difference(found, expected) < 1e-5
    unit = expected / np.linalg.norm(expected, axis=1, keepdims=True)
    assert difference(model.embed(files), unit) < 1e-5


def test_pattern_maps_are_pytorchs(model, network, files):
    expected = by_pytorch(network, files).pattern_maps.numpy()
    found = model.pattern_maps(files)
    assert found.dtype == np.float32 and found.shape == expected.shape == (4, 6, HEIGHT // 16, WIDTH // 16)
    assert difference(found, expected) < 1e-5
    assert model.pattern_maps([]).shape == (0, 6, HEIGHT // 16, WIDTH // 16)


def test_paths_pillows_images_and_arrays_are_the_same(model, files):
    expected = model.embed(files)
    opened = [Image.open(file) for file in files]
    arrays = [np.asarray(Image.open(file)) for file in files]
    assert arrays[2].ndim == 2
    for images in (
        [str(file) for file in files],
        opened,
        arrays,
        [files[0], opened[1], arrays[2], str(files[3])],
        iter(files),
    ):
        np.testing.assert_array_equal(model.embed(images), expected)
    stack = np.stack([np.asarray(Image.open(file).convert("RGB").resize((WIDTH, HEIGHT), 2)) for file in files])
    np.testing.assert_array_equal(model.embed(stack), expected)
    # Against rows in the same places: some CPUs round a row by its place in the batch.
    np.testing.assert_array_equal(model.embed([opened[0]] * 4), model.embed([arrays[0]] * 4))


def test_any_number_of_images(model, files):
    expected = model.embed(files)
    assert model.embed([]).shape == (0, model.size)
    assert model.embed([], errors="skip")[0].shape == (0, model.size)
    # Three batches, the last of them filled up: one shape, which `files` had.
    many = model.embed([files[place % 4] for place in range(10)], batch_size=4)
    np.testing.assert_array_equal(many, expected[np.arange(10) % 4])


def test_images_that_cannot_be_read_are_named(model, files, tmp_path):
    (tmp_path / "text.jpg").write_text("no image")
    cut = Image.open(files[0])
    cut.fp.seek(0)
    (tmp_path / "cut.png").write_bytes(cut.fp.read(400))
    images = [tmp_path / "none.jpg", files[0], tmp_path / "text.jpg", Image.open(tmp_path / "cut.png")]
    embeddings, skipped = model.embed([*images, Image.fromarray(np.ones((9, 5), np.float32))], errors="skip")
    assert [(image.position, image.name) for image in skipped] == [
        *((0, f"{tmp_path}/none.jpg"), (2, f"{tmp_path}/text.jpg"), (3, f"{tmp_path}/cut.png"), (4, "images[4]"))
    ]
    assert all(image.reason and "\n" not in image.reason for image in skipped)
    np.testing.assert_allclose(embeddings, model.embed([files[0]] * 4)[:1], rtol=1e-4, atol=1e-6)
    with pytest.raises(UserError, match=r"none\.jpg: No such file.*errors='skip'"):
        model.embed(images)
    with pytest.raises(UserError, match=r"text\.jpg: not an image"):
        model.pattern_maps(images[1:])


@pytest.mark.parametrize(
    ("images", "message"),
    [
        ("a.jpg", r"images .*single str.*list"),
        (np.zeros((9, 9, 3), np.uint8), r"images .*single"),
        (np.zeros((9, 9), np.uint8), r"images .*single"),
        (Image.new("RGB", (4, 4)), r"images .*single"),
        (5, r"images .*int"),
        ([np.zeros((9, 9, 3), np.float32)], r"images\[0\] .*float32\[9, 9, 3\].*uint8"),
        (["a.jpg", np.zeros((9, 9, 4), np.uint8)], r"images\[1\] .*uint8\[9, 9, 4\]"),
        (["a.jpg", None], r"images\[1\] .*NoneType"),
    ],
)
def test_what_is_no_list_of_images_is_refused(model, images, message):
    with pytest.raises(ArgumentError, match=message):
        model.embed(images, errors="skip")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"errors": "ignore"}, r"errors = 'ignore'.*'raise' or 'skip'"),
        ({"batch_size": 0}, "batch_size = 0"),
        ({"batch_size": 2.5}, "batch_size = 2.5"),
        ({"modality": "thermal"}, "modality = 'thermal'.*'visible' or 'infrared'"),
        ({"modality": ["visible"]}, "modality has 1 entries for 4 images"),
        ({"modality": ["visible", 1, 2, 0]}, r"modality\[2\] = 2"),
    ],
)
def test_arguments_that_cannot_be_are_refused(model, files, options, message):
    with pytest.raises(ArgumentError, match=message):
        model.embed(files, **options)


# ---- a method that needs the modality, and one without maps ----


def drawn(settings):
    """A model with random arrays of the right shapes."""
    generator, shapes = np.random.default_rng(0), template_of(make_method(settings), 3)
    arrays = jax.tree.map(lambda leaf: generator.normal(0, 0.2, leaf.shape).astype(leaf.dtype), shapes)
    return Model(settings, {**arrays, "batch_stats": jax.tree.map(np.abs, arrays["batch_stats"])}, "drawn")


@pytest.fixture(scope="module")
def agw():
    return drawn(AGWSettings().replace({**SMALL, "data.height": 64, "data.width": 32}))


def test_modality_is_asked_for_and_used(agw, files):
    for modality in (None, ["visible", "visible", "infrared", -1]):
        with pytest.raises(ArgumentError, match=r"modality .*'agw'.*'visible' or 'infrared'"):
            agw.embed(files, modality=modality)
    visible, infrared = (agw.embed(files, modality=name) for name in ("visible", "infrared"))
    assert np.abs(visible - infrared).max(1).min() > 1e-3
    mixed = np.stack([visible[0], infrared[1], visible[2], infrared[3]])
    for modality in (["visible", "infrared", 0, 1], np.array([0, 1, 0, 1])):
        np.testing.assert_array_equal(agw.embed(files, modality=modality), mixed)


def test_a_method_without_maps_says_so(agw, workdir):
    with pytest.raises(UserError, match=r"'agw'.*pattern maps"):
        agw.pattern_maps([], modality="visible")
    with pytest.raises(UserError, match=r"model\.pattern_module = 'none'"):
        drawn(replace(SETTINGS, {"model.pattern_module": "none"})).pattern_maps([])


# ---- what decides an embedding ----

DTYPES = {"float32": "float32", "bfloat16": "bfloat16", "auto": "float32"}  # on a CPU, where the tests run


def test_the_fingerprint_is_of_what_decides_an_embedding(model, agw):
    def of(changes):
        return Model(replace(model.settings, changes), model.variables, "x").fingerprint

    assert len(bytes.fromhex(model.fingerprint)) == hashlib.sha256().digest_size
    same = {"seed": 5, "model.fused": "off", "dtype": "bfloat16", "train.num_epochs": 3, "dataset.data_dir": "/x"}
    assert of(same) == model.fingerprint
    types = {name: Model(replace(model.settings, {"dtype": name}), model.variables, "x").dtype for name in DTYPES}
    assert types == DTYPES
    others = [
        *({"data.height": 96}, {"data.width": 96}, {"data.resize": "lanczos"}, {"eval.flip": True}),
        {"model.channel_module": "se"},
    ]
    assert len({model.fingerprint, agw.fingerprint, *map(of, others)}) == 7
    moved = jax.tree.map(np.copy, model.variables)
    moved["batch_stats"]["neck"]["mean"][3] += 1e-3
    assert Model(model.settings, moved, "x").fingerprint != model.fingerprint


# ---- saving ----


@pytest.fixture(scope="module")
def saved(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "my model"
    model.save(folder)
    return folder


def test_a_saved_model_is_the_model(model, saved, files):
    assert sorted(path.name for path in saved.iterdir()) == ["README.md", "model.safetensors"]
    assert [path.name for path in saved.parent.iterdir()] == ["my model"]
    for source in (saved, str(saved), saved / "model.safetensors"):
        found = load(source)
        assert found.fingerprint == model.fingerprint
        assert found.metrics == METRICS
    np.testing.assert_array_equal(found.embed(files), model.embed(files))
    # It says nothing of the machine that it comes from.
    assert to_dict(found.settings) == to_dict(
        replace(SETTINGS, {"dataset.source": "", "dataset.data_dir": MPANetSettings().dataset.data_dir})
    )
    assert b"somebody" not in (saved / "model.safetensors").read_bytes()


def test_the_card_says_what_it_is(model, saved):
    card = (saved / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: mpanet_jax\n") and "\n# my model\n" in card
    for words in (model.fingerprint, "`sysu_mm01`", "signed agreement", "load(", "| sysu/all/single | 10.25 ± 1.50 |"):
        assert words in card, words
    # Every setting that is not the paper's, and no other.
    rows = [line.split("`")[1] for line in card.splitlines() if line.startswith("| `")]
    assert set(rows) == set(SMALL)
    assert "| `data.height` | `384` | `128` |" in card and "somebody" not in card


def test_a_checkpoint_of_a_workdir_can_be_chosen(workdir, network, files, tmp_path):
    folder, figures = tmp_path / "run", {name: values | {"checkpoint": "best"} for name, values in METRICS.items()}
    shutil.copytree(workdir, folder)
    best = randomise(MPANet(5, **SIZE), 1).eval()
    state_dict = {name: value.detach().numpy().copy() for name, value in best.state_dict().items()}
    write_state_dict(tmp_path / "best.safetensors", state_dict)
    convert(tmp_path / "best.safetensors", tmp_path / "best", settings=SETTINGS)
    shutil.copytree(tmp_path / "best/checkpoints", folder / "checkpoints_best")
    (folder / "metrics_best.json").write_text(json.dumps(figures))
    for checkpoint, expected in (("last", network), ("best", best)):
        found = load(folder, checkpoint=checkpoint)
        assert difference(found.embed(files, normalize=False), by_pytorch(expected, files).embedding.numpy()) < 1e-5
        assert found.metrics == (METRICS if checkpoint == "last" else figures)
    untrained = load(folder, checkpoint="untrained")
    fresh = Model(SETTINGS, initial_variables(make_method(SETTINGS), 1), "fresh")
    np.testing.assert_array_equal(untrained.embed(files), fresh.embed(files))
    assert untrained.metrics is None
    (folder / "metrics_untrained.json").write_text(json.dumps(METRICS))
    assert load(folder, checkpoint="untrained").metrics == METRICS


def test_a_checkpoint_that_is_not_there_is_refused(workdir, saved):
    with pytest.raises(UserError, match=r"checkpoints_best: no checkpoint .*eval\.best"):
        load(workdir, checkpoint="best")
    with pytest.raises(ArgumentError, match=r"checkpoint = 'bets': expected .*'untrained'.*did you mean 'best'"):
        load(workdir, checkpoint="bets")
    for source in (saved, saved / "model.safetensors", workdir.parent / "published.safetensors"):
        with pytest.raises(ArgumentError, match=rf"checkpoint = 'best': only a run's workdir .*{source.name}"):
            load(source, checkpoint="best")


def test_metrics_of_another_step_are_not_the_models(workdir, tmp_path):
    shutil.copytree(workdir, tmp_path / "run")
    older = {name: {**values, "step": 7} for name, values in METRICS.items()}
    for text in (json.dumps(older), "{", "[]", '{"a": 1}'):
        (tmp_path / "run/metrics.json").write_text(text)
        assert load(tmp_path / "run").metrics is None


def test_nothing_is_saved_over_something(model, tmp_path):
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken/notes.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for name in ("taken", "file"):
        with pytest.raises(UserError, match=f"{name}: exists already"):
            model.save(tmp_path / name)
    (tmp_path / "empty").mkdir()
    model.save(tmp_path / "empty")
    assert (tmp_path / "empty/README.md").exists()


def test_a_save_that_fails_leaves_nothing(model, tmp_path, monkeypatch):
    monkeypatch.setattr("mpanet_jax.model_folder.model_card", lambda *a, **k: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model.save(tmp_path / "new/folder")
    assert list((tmp_path / "new").iterdir()) == []


# ---- the hub ----


class Hub:
    """Stands in for `huggingface_hub.HfApi`: records what is asked of it, or fails."""

    error = None
    calls: list = []  # noqa: RUF012

    def __init__(self, token=None):
        self.calls.append(("token", token))

    def create_repo(self, repo_id, **options):
        if self.error:
            raise self.error
        self.calls.append(("create", repo_id, options))
        return f"https://hub/{repo_id}"

    def upload_folder(self, *, repo_id, folder_path, **options):
        files = {path.name: path.read_bytes() for path in Path(folder_path).iterdir()}
        self.calls.append(("upload", repo_id, files))


@pytest.fixture
def hub(monkeypatch):
    huggingface_hub = pytest.importorskip("huggingface_hub")
    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    monkeypatch.setattr(Hub, "calls", [])
    return Hub


def test_a_pushed_model_is_what_save_writes_and_loads_from_the_cache(model, saved, hub, tmp_path, monkeypatch):
    assert model.push_to_hub("somebody/people", private=True, token="t") == "https://hub/somebody/people"
    token, create, upload = hub.calls
    assert token == ("token", "t")
    assert create == ("create", "somebody/people", {"private": True, "exist_ok": True})
    assert upload[1] == "somebody/people" and set(upload[2]) == {"README.md", "model.safetensors"}
    assert b"load('hf:somebody/people')" in upload[2]["README.md"]
    # The cache as a fetch leaves it.
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"^hf:somebody/people: .*hf download somebody/people model\.safetensors$"):
        load("hf:somebody/people")
    repository = tmp_path / "models--somebody--people"
    (repository / "snapshots" / ("0" * 40)).mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs/main").write_text("0" * 40)
    (repository / "snapshots" / ("0" * 40) / "model.safetensors").write_bytes(upload[2]["model.safetensors"])
    assert load("hf:somebody/people").fingerprint == model.fingerprint


def test_a_push_that_fails_says_why_in_one_line(model, hub, monkeypatch):
    for name in ("people", "a/b/c", "", "hf:x"):
        with pytest.raises(ArgumentError, match=r"repository = .*'owner/name'"):
            model.push_to_hub(name)
    assert hub.calls == []
    for error in (OSError("Network is unreachable"), RuntimeError("401 Client Error.\nInvalid token")):
        monkeypatch.setattr(hub, "error", error)
        with pytest.raises(UserError, match=r"^somebody/people: .*hf auth login") as raised:
            model.push_to_hub("somebody/people")
        assert str(error).splitlines()[0] in str(raised.value) and "\n" not in str(raised.value)


def test_what_is_not_there_is_said_with_what_could_be(tmp_path):
    with pytest.raises(UserError, match=r"nowhere: no such .*workdir.*\.safetensors.*hf:owner/name"):
        load(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="empty"):
        load(tmp_path / "empty")
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(UserError, match=r"notes\.txt"):
        load(tmp_path / "notes.txt")


def test_an_image_without_pixels_is_skipped_not_black(model):
    empty = [np.zeros((0, 9, 3), np.uint8), Image.new("RGB", (9, 9)).crop((3, 3, 3, 9))]
    rows, skipped = model.embed([*empty, np.full((9, 9), 7, np.uint8)], errors="skip")
    assert len(rows) == 1 and [image.position for image in skipped] == [0, 1]
