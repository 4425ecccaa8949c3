"""From image files to an embeddings file: against PyTorch and Pillow, through the evaluator, and with bad images."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import ExifTags, Image

torch = pytest.importorskip("torch")


from configs import synthetic as synthetic_config  # noqa: E402
from mpanet_jax.datasets.synthetic import write_dataset  # noqa: E402
from mpanet_jax.embeddings import load_embeddings, save_embeddings  # noqa: E402
from mpanet_jax.errors import UserError  # noqa: E402
from mpanet_jax.evaluation.extract import run_batches  # noqa: E402
from mpanet_jax.evaluation.given_images import rows_of_images  # noqa: E402
from mpanet_jax.evaluation.images import embeddings_of, list_images  # noqa: E402
from mpanet_jax.evaluation.workdir import evaluate_workdir  # noqa: E402
from mpanet_jax.methods import make_method, settings_of  # noqa: E402
from mpanet_jax.methods.mpanet import MPANetSettings  # noqa: E402
from mpanet_jax.model import Model, load  # noqa: E402
from mpanet_jax.run_files import load_settings, save_settings  # noqa: E402
from mpanet_jax.settings import DataSettings  # noqa: E402
from mpanet_jax.settings_base import replace  # noqa: E402
from mpanet_jax.weights.convert import convert, template_of  # noqa: E402
from mpanet_jax.weights.files import write_state_dict  # noqa: E402
from mpanet_jax.weights.names import to_state_dict  # noqa: E402
from tests.evaluation.by_name import evaluate_embeddings  # noqa: E402
from tests.reference.model import MPANet, randomise  # noqa: E402
from tests.scripts_in_process import process  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
SIZE = {"stage_sizes": (1, 1, 1, 1), "width": 16}
SETTINGS = replace(MPANetSettings(), {f"model.{name}": value for name, value in SIZE.items()})
GENERATOR = np.random.default_rng(0)


def start_extract(*arguments):
    """In a process of its own: what libraries of C print counts too."""
    return subprocess.run(
        [sys.executable, ROOT / "scripts" / "extract.py", *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )


def run_extract(*arguments):
    return process("extract.py", *arguments)


def write_weights(path, network):
    """PyTorch's weights as a file without settings."""
    write_state_dict(path, {name: value.detach().numpy().copy() for name, value in network.state_dict().items()})


def picture(height=32, width=16, generator=GENERATOR):
    return Image.fromarray(generator.integers(0, 256, (height, width, 3), dtype=np.uint8))


def at_size(model, height, width):
    """The model for images of another size."""
    settings = replace(model.settings, {"data.height": height, "data.width": width})
    return Model(settings, model.variables, model.source)


def embed_listed(model, images):
    """Embeddings of `list_images`, as scripts/extract.py makes them."""
    modality = [image.modality for image in images]
    return embeddings_of(images, model.embed([image.file for image in images], modality=modality, normalize=False))


def grey16(path, values):
    Image.fromarray(values.astype(np.uint16)).save(path)


@pytest.fixture(scope="module")
def network():
    return randomise(MPANet(5, **SIZE), 0).eval()


@pytest.fixture(scope="module")
def folder_of_weights(network, tmp_path_factory):
    """The PyTorch network as scripts/convert_weights.py leaves it."""
    folder = tmp_path_factory.mktemp("weights")
    write_weights(folder / "published.safetensors", network)
    convert(folder / "published.safetensors", folder / "converted", settings=SETTINGS)
    return folder / "converted"


@pytest.fixture(scope="module")
def kinds(tmp_path_factory):
    """Every kind of image, of several sizes, in folders with odd names; and things that are no images."""
    folder = tmp_path_factory.mktemp("kinds") / "my photos"
    (folder / "Größe 人").mkdir(parents=True)
    (folder / ".hidden").mkdir()
    picture(64, 32).save(folder / "Größe 人/b [bold] 1.PNG")
    picture(20, 12).save(folder / "a.bmp")
    picture(64, 32).convert("L").save(folder / "grey.png")
    picture(64, 32).convert("P").save(folder / "palette.gif")
    picture(64, 32).convert("RGBA").save(folder / "transparent.webp", lossless=True)
    picture(64, 32).convert("CMYK").save(folder / "print.jpg", quality=95)
    # Of odd sizes, one is reduced and one enlarged; a viewer would turn the first.
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    picture(131, 47).save(folder / "camera.jpg", quality=90, exif=exif)
    picture(41, 27).convert("L").save(folder / "thermal.jpg", quality=90)
    picture(64, 32).save(folder / ".hidden/no.png")
    picture(64, 32).save(folder / "._a.png")
    (folder / "notes.txt").write_text("no image")
    os.symlink(folder, folder / "Größe 人/loop")
    return folder


KINDS = [
    *("Größe 人/b [bold] 1.PNG", "a.bmp", "grey.png", "palette.gif", "print.jpg", "transparent.webp"),
    *("camera.jpg", "thermal.jpg"),
]


@pytest.mark.parametrize("resize", ["bilinear", "lanczos"])
def test_a_folder_is_embedded_as_pytorch_and_pillow_do(kinds, network, tmp_path, resize):
    out, weights = tmp_path / "new folder" / "f.npz", tmp_path / "weights"
    write_weights(tmp_path / "published.safetensors", network)
    convert(tmp_path / "published.safetensors", weights, settings=replace(SETTINGS, {"data.resize": resize}))
    extract = start_extract if resize == "bilinear" else run_extract  # one of them also for what libraries of C print
    result = extract(
        *("--weights", weights, "--images", kinds, "--out", out, "--dtype", "float32"),
        # In maps of 4×2 pixels float32 alone is good for 3e-5: so far PyTorch's own is from its float64.
        *("--height", 128, "--width", 64, "--batch_size", 4),
    )
    assert (result.returncode, result.stderr) == (0, "")
    assert "8 images as vectors of 3,584" in result.stdout
    embeddings = load_embeddings(out)
    assert embeddings.paths.tolist() == sorted(KINDS)
    assert embeddings.pids.tolist() == embeddings.camids.tolist() == [-1] * 8
    pixels = [
        np.asarray(Image.open(kinds / name).convert("RGB").resize((64, 128), Image.Resampling[resize.upper()]))
        for name in sorted(KINDS)
    ]
    normalised = (np.stack(pixels) / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    with torch.no_grad():
        expected = network(torch.tensor(normalised.transpose(0, 3, 1, 2), dtype=torch.float32)).embedding.numpy()
    error = np.linalg.norm(embeddings.features - expected, axis=1) / np.linalg.norm(expected, axis=1)
    assert error.max() < 1e-5
    assert os.listdir(out.parent) == ["f.npz"]


def test_sixteen_bits_keep_their_upper_eight(tmp_path):
    values = np.arange(512).reshape(32, 16) * 128
    for name in ("a.png", "b.tiff"):
        grey16(tmp_path / name, values)
    (tmp_path / "c.pgm").write_bytes(b"P5 16 32 65535\n" + values.astype(">u2").tobytes())
    files = [image.file for image in list_images(tmp_path)]
    images = [*files, Image.open(files[0]), (values // 256).astype(np.uint8)]
    blocks, _ = rows_of_images(lambda x, _: x, images, np.full(5, -1), DataSettings(32, 16), batch_size=5)
    for pixels in np.concatenate(blocks):
        np.testing.assert_array_equal(pixels, np.repeat((values // 256)[..., None], 3, 2))


def damage(folder):
    """Three good images among seven that are not; returns {name: a word of the reason}."""
    generator = np.random.default_rng(1)  # the same three, whatever other tests have drawn
    for name in ("1.png", "5.png", "9.png"):
        picture(64, 32, generator).save(folder / name)
    picture(64, 32).save(folder / "2.jpg")
    (folder / "2.jpg").write_bytes((folder / "2.jpg").read_bytes()[:900])
    (folder / "3.jpg").write_bytes(b"")
    (folder / "4.jpg").write_text("this is no image")
    (folder / "6.png").write_bytes((folder / "1.png").read_bytes()[:300])
    Image.fromarray(np.ones((32, 16), np.float32)).save(folder / "7.tiff")
    (folder / "8.jpg").write_bytes(b"\xff\xd8 and nothing else")
    (folder / "0.bmp").symlink_to("nowhere")
    return {"0": "No such file", "2": "", "3": "empty file", "4": "not an image", "6": "", "7": "32 bits", "8": ""}


def test_images_that_cannot_be_read_are_named_and_left_out(folder_of_weights, tmp_path):
    folder, out = tmp_path / "images", tmp_path / "f.npz"
    folder.mkdir()
    reasons = damage(folder)
    arguments = ("--weights", folder_of_weights, "--images", folder, "--out", out, "--height", 64, "--width", 32)
    result = start_extract(*arguments, "--batch_size", 4)
    assert result.returncode == 1
    *skipped, last = result.stderr.strip().splitlines()
    assert last == "7 of 10 images skipped"
    assert len(skipped) == 7
    for line, (name, reason) in zip(skipped, reasons.items(), strict=True):
        assert line.startswith(f"skipped {folder}/{name}.")
        assert reason in line
        assert len(line.partition(": ")[2]) > 5
        assert "prepare" not in line  # the advice for prepared data sets
    embeddings = load_embeddings(out)
    assert embeddings.paths.tolist() == ["1.png", "5.png", "9.png"]
    # The neighbours of a bad image are what they are alone.
    model = at_size(load(folder_of_weights), 64, 32)
    for row, name in enumerate(embeddings.paths):
        (tmp_path / "one.txt").write_text(f"images/{name}\n")
        alone = embed_listed(model, list_images(tmp_path / "one.txt"))
        found, expected = embeddings.features[row], alone.features[0]
        assert np.linalg.norm(found - expected) < 1e-5 * np.linalg.norm(expected)

    strict = tmp_path / "strict.npz"
    arguments = [strict if argument == out else argument for argument in arguments]
    result = run_extract(*arguments, "--strict")
    assert result.returncode == 2
    assert len(result.stderr.strip().splitlines()) == 1
    assert f"{folder}/0.bmp" in result.stderr
    assert not list(tmp_path.glob("*strict*"))


def test_nothing_readable_is_an_error(tmp_path):
    (tmp_path / "a.jpg").write_bytes(b"")
    images = list_images(tmp_path)
    options = {"batch_size": 4, "errors": "skip"}
    blocks, skipped = rows_of_images(
        lambda x, _: x[:, 0, 0], [images[0].file], np.array([-1]), DataSettings(32, 16), **options
    )
    assert [len(block) for block in blocks] == [0]
    assert skipped == [(0, f"{tmp_path}/a.jpg", "empty file")]
    with pytest.raises(UserError, match="none of the 1 images"):
        embeddings_of(images, blocks[0], skipped)


def test_many_batches_have_one_shape_and_keep_the_order(tmp_path):
    for number in range(23):
        Image.new("RGB", (16, 32), (number, 0, 0)).save(tmp_path / f"{number:02d}.png")
    images, seen = [image.file for image in list_images(tmp_path)], []

    def embed(images, modality):
        seen.append((images.shape, modality.tolist()))
        return images[:, 0, 0, :2].astype(np.float32)

    modality = np.arange(23, dtype=np.int32) % 2
    blocks, _ = rows_of_images(embed, images, modality, DataSettings(32, 16), batch_size=4)
    size = -(-4 // jax.local_device_count()) * jax.local_device_count()
    assert {shape for shape, _ in seen} == {(size, 32, 16, 3)}
    assert [number for _, numbers in seen for number in numbers][:23] == modality.tolist()
    assert np.concatenate(blocks)[:, 0].tolist() == list(range(23))


@pytest.mark.parametrize(
    ("root", "file", "expected"),
    [
        (".", "sysu/cam3/0007/0012.jpg", ("sysu/cam3/0007/0012.jpg", 7, 3)),
        ("sysu/cam3", "sysu/cam3/0007/0012.jpg", ("cam3/0007/0012.jpg", 7, 3)),
        ("llcm", "llcm/test_nir/cam9/0031/x_1.jpg", ("test_nir/cam9/0031/x_1.jpg", 31, 9)),
        ("llcm/test_vis", "llcm/test_vis/cam9/0031/x_1.jpg", ("test_vis/cam9/0031/x_1.jpg", 31, 9)),
        ("regdb", "regdb/Visible/285/v 1.bmp", ("Visible/285/v 1.bmp", 285, 1)),
        ("regdb/Thermal/4", "regdb/Thermal/4/t.bmp", ("Thermal/4/t.bmp", 4, 2)),
        (".", "camping3/7/1.jpg", ("camping3/7/1.jpg", -1, -1)),
        (".", "cam3/seven/1.jpg", ("cam3/seven/1.jpg", -1, -1)),
        (".", "cam3/7/more/1.jpg", ("cam3/7/more/1.jpg", -1, -1)),
        (".", f"cam3/{'9' * 30}/1.jpg", (f"cam3/{'9' * 30}/1.jpg", -1, -1)),
    ],
)
def test_identity_and_camera_come_from_a_known_layout(tmp_path, root, file, expected):
    (tmp_path / file).parent.mkdir(parents=True)
    (tmp_path / file).touch()
    (image,) = list_images(tmp_path / root)
    assert (image.path, image.pid, image.camid) == expected
    assert image.file == tmp_path / root / (tmp_path / file).relative_to(tmp_path / root)


def test_a_list_keeps_its_order_and_takes_absolute_paths(tmp_path):
    (tmp_path / "list.txt").write_text(f"\ufeffb 1.jpg\r\n\r\n{tmp_path}/x/a.xyz\n  sub/ü.png  \n", encoding="utf-8")
    images = list_images(tmp_path / "list.txt")
    assert [image.path for image in images] == ["b 1.jpg", f"{tmp_path}/x/a.xyz", "sub/ü.png"]
    assert [image.file for image in images] == [tmp_path / "b 1.jpg", tmp_path / "x/a.xyz", tmp_path / "sub/ü.png"]
    layouts = [f"{folder}/{'9' * 5000}/1.jpg" for folder in ("cam1", "Visible", "test_nir/cam9")]
    (tmp_path / "list.txt").write_text("\n".join(layouts))
    assert [(image.path, image.pid) for image in list_images(tmp_path / "list.txt")] == [(p, -1) for p in layouts]


def test_sources_without_images_are_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty/notes.txt").write_text("\n \n")
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00\xd8")
    for source, message in (
        ("empty", "no images found; expected files that end in .jpg"),
        ("empty/notes.txt", "no images found; expected one path a line"),
        ("binary.txt", "not a UTF-8 text file"),
        ("nowhere", "no such folder or list file"),
    ):
        with pytest.raises(UserError, match=message):
            list_images(tmp_path / source)


@pytest.fixture(scope="module")
def sysu(tmp_path_factory):
    raw = tmp_path_factory.mktemp("sysu") / "raw"
    write_dataset("sysu_mm01", raw, num_train_ids=6, num_test_ids=4, images_per_camera=(2, 4), height=(48, 56))
    return raw


@pytest.fixture(scope="module")
def workdir(sysu, folder_of_weights, tmp_path_factory):
    """A run's folder: the config and a checkpoint."""
    workdir = tmp_path_factory.mktemp("runs") / "run"
    shutil.copytree(folder_of_weights, workdir)
    config = synthetic_config.get_config()
    config.dataset.source, config.dataset.data_dir = str(sysu), str(workdir.parent / "prepared")
    (workdir.parent / "prepared").mkdir()
    config.data.height, config.data.width, config.data.resize = 32, 16, "lanczos"
    config.model.width, config.model.stage_sizes = SIZE["width"], SIZE["stage_sizes"]
    config.eval.batch_size = 16
    config.dtype = "float32"
    save_settings(settings_of(config.to_dict()), workdir)
    return workdir


def test_sysu_by_the_documented_commands_evaluates_as_the_workdir_does(sysu, workdir, tmp_path):
    help_text = (ROOT / "scripts/extract.py").read_text()
    commands = re.findall(r"^  (for id in .*)$", help_text, re.MULTILINE)
    assert len(commands) == 2
    for command in commands:
        subprocess.run(["bash", "-c", command], cwd=sysu, stderr=subprocess.DEVNULL)
    network = load(workdir)
    assert network.settings == load_settings(workdir)
    data = network.settings.data
    assert (data.height, data.width, data.resize, network.settings.eval.batch_size) == (32, 16, "lanczos", 16)
    for name in ("query", "gallery"):
        images = list_images(sysu / f"{name}.txt")
        save_embeddings(tmp_path / f"{name}.npz", embed_listed(network, images))
    query, gallery = (load_embeddings(tmp_path / f"{name}.npz") for name in ("query", "gallery"))
    assert set(query.camids) == {3, 6}
    assert set(gallery.camids) == {1, 2, 4, 5}
    metrics = evaluate_embeddings(query, gallery, protocol="sysu_mm01", permutation=sysu / "exp/rand_perm_cam.mat")
    expected = evaluate_workdir(workdir)
    assert set(metrics) == set(expected)
    for name, values in metrics.items():
        for figure in ("rank1", "rank5", "mAP", "mINP", "num_query", "num_gallery"):
            assert values[figure] == pytest.approx(expected[name][figure], rel=1e-6)


def test_unknown_identities_are_not_evaluated(kinds, folder_of_weights):
    embeddings = embed_listed(at_size(load(folder_of_weights), 32, 16), list_images(kinds))
    for protocol in ("sysu_mm01_random", "regdb", "llcm"):
        with pytest.raises(UserError, match="8 of 8 pids are negative"):
            evaluate_embeddings(embeddings, embeddings, protocol=protocol)


def images_for(network):
    data = network.settings.data
    shape = (4 * jax.local_device_count(), data.height, data.width, 3)
    return GENERATOR.integers(0, 256, shape, dtype=np.uint8)


def test_settings_say_what_arrays_do_not(network, tmp_path):
    # SE and MAM have the same arrays; only the settings that come with the weights tell them apart.
    squeeze_excite = replace(SETTINGS, {"model.channel_module": "se", "data.height": 64, "data.width": 32})
    write_weights(tmp_path / "bare.safetensors", network)
    for name, settings in (("mam", SETTINGS), ("se", squeeze_excite)):
        convert(tmp_path / "bare.safetensors", tmp_path / f"{name}.safetensors", settings=settings)
    networks = {name: load(tmp_path / f"{name}.safetensors") for name in ("mam", "se")}
    networks["told"] = load(tmp_path / "bare.safetensors", settings=squeeze_excite)
    images = images_for(networks["se"])
    assert images.shape[1:] == (64, 32, 3)
    embeddings = {name: network.embed(images, normalize=False) for name, network in networks.items()}
    np.testing.assert_array_equal(embeddings["told"], embeddings["se"])
    assert np.abs(embeddings["mam"] - embeddings["se"]).max() > 0.1
    with pytest.raises(UserError, match=r"se\.safetensors: .*model\.channel_module is 'se' there and 'mam' here"):
        load(tmp_path / "se.safetensors", settings=SETTINGS)


def test_script_takes_the_network_of_bare_weights_from_a_config(kinds, tmp_path):
    network = randomise(MPANet(5, **SIZE, mam="none"), 0)
    write_weights(tmp_path / "bare.safetensors", network)
    arguments = ("--weights", tmp_path / "bare.safetensors", "--images", kinds, "--out", tmp_path / "f.npz")
    size = ("--height", 64, "--width", 32)
    refused = run_extract(*arguments, *size)
    assert refused.returncode == 2 and refused.stderr.count("\n") == 1, refused.stderr
    assert "bare.safetensors: does not fit the model" in refused.stderr
    assert "--config=configs/NAME.py" in refused.stderr
    config = (f"--config={ROOT}/configs/synthetic.py", "--config.model.channel_module=none")
    result = run_extract(*arguments, *size, *config)
    assert (result.returncode, result.stderr) == (0, "")
    settings = replace(SETTINGS, {"model.channel_module": "none", "data.height": 64, "data.width": 32})
    expected = embed_listed(load(tmp_path / "bare.safetensors", settings=settings), list_images(kinds))
    np.testing.assert_array_equal(load_embeddings(tmp_path / "f.npz").features, expected.features)


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_classifiers_may_have_been_left_out(workdir, tmp_path, kind):
    target = tmp_path / ("small" if kind == "folder" else "small.safetensors")
    convert(workdir, target, drop_classifiers=True)
    network = load(workdir)
    images = images_for(network)
    found = load(target)
    np.testing.assert_array_equal(found.embed(images), network.embed(images))
    assert found.fingerprint == network.fingerprint


def test_bfloat16_is_near_float32(workdir):
    images = GENERATOR.integers(0, 256, (4 * jax.local_device_count(), 128, 64, 3), dtype=np.uint8)
    precise, coarse = (at_size(load(workdir, dtype=dtype), 128, 64).embed(images) for dtype in (None, "bfloat16"))
    cosine = (precise * coarse).sum(1)
    assert not np.array_equal(precise, coarse)
    assert cosine.min() > 0.99


def test_a_bare_resnet_is_refused(tmp_path):
    method = make_method(MPANetSettings())
    variables = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), template_of(method, 1))
    resnet = {
        collection: {name: tree for name, tree in variables[collection].items() if name.startswith("st")}
        for collection in ("params", "batch_stats")
    }
    write_state_dict(tmp_path / "resnet50.safetensors", to_state_dict(resnet, method.names()))
    with pytest.raises(UserError, match=r"resnet50.safetensors: these weights are a bare backbone's"):
        load(tmp_path / "resnet50.safetensors")
    convert(tmp_path / "resnet50.safetensors", tmp_path / "folder")
    with pytest.raises(UserError, match=r"folder: these weights are a bare backbone's"):
        load(tmp_path / "folder")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--out: missing; give it"),
        (["--out", "f.npz"], "expected one of --workdir and --weights"),
        (["--out", "f.npz", "--workdir", "a", "--weights", "b"], "expected one of --workdir and --weights"),
        (["--out", "f.txt", "--weights", "b"], "ends in .npz"),
        (["--out", "f.npz", "--weights", "none.safetensors"], "none.safetensors: no such file"),
        (["--out", "f.npz", "--workdir", "nowhere"], "nowhere: no such file or folder"),
        (["--out", "f.npz", "--workdir", "a", f"--config={ROOT}/configs/sysu.py"], "--config goes with --weights"),
    ],
)
def test_bad_flags_end_with_one_line_and_code_2(kinds, tmp_path, arguments, message):
    arguments = [tmp_path / a if a.startswith("f.") else a for a in arguments]
    result = run_extract("--images", kinds, *arguments)
    assert result.returncode == 2
    assert message in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    assert not os.listdir(tmp_path)


def numbered_batches(count, closed):
    """Batches of two images, which have the batch's number in their pixels; the last image is padding."""
    try:
        for number in range(count):
            mask = np.array([True, number < count - 1])
            yield {"images": np.full((2, 1), number, np.uint8), "modality": np.zeros(2, np.int32), "mask": mask}
    finally:
        closed.append(True)


@pytest.mark.parametrize("count", [1, 2, 3, 6])
def test_rows_come_in_the_order_of_the_batches_without_padding(count):
    closed = []
    rows = [
        rows for _, rows in run_batches(lambda images, _: jax.numpy.asarray(images), numbered_batches(count, closed))
    ]
    assert np.concatenate(rows)[:, 0].tolist() == [n for n in range(count) for _ in range(2)][:-1]
    assert rows[0].dtype == np.float32 and closed


def test_batches_are_closed_when_the_network_fails():
    closed = []

    def fails(images, modality):
        if images[0, 0] == 2:
            raise ZeroDivisionError
        return images

    with pytest.raises(ZeroDivisionError) as kept:
        list(run_batches(fails, numbered_batches(6, closed)))
    assert closed and kept.traceback  # though the traceback holds their frame
