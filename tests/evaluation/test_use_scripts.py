"""search.py, verify.py and calibrate.py as they are called, with a trained model and drawn people."""

import dataclasses
import itertools
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import mpanet_jax
from mpanet_jax.datasets.synthetic import write_dataset
from mpanet_jax.embeddings import Embeddings, save_embeddings
from mpanet_jax.evaluation.calibration import Calibration
from mpanet_jax.evaluation.pair_score import calibration_path
from mpanet_jax.model import load
from mpanet_jax.run_files import save_settings
from mpanet_jax.settings_base import replace
from mpanet_jax.weights.convert import convert
from tests.pages import run_code
from tests.scripts_in_process import Refused, process
from tests.scripts_in_process import run as run_here
from tests.trained import person, save_trained, trained_model

pytestmark = pytest.mark.xdist_group("trained")
ROOT = Path(__file__).resolve().parents[2]


def run(script, *arguments):
    return process(f"{script}.py", *arguments)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A model, a gallery of eight people in visible light with one broken file, and infrared queries."""
    place = tmp_path_factory.mktemp("use")
    save_trained(place / "model.safetensors")
    for pid in range(8):
        (place / f"gallery/{pid}").mkdir(parents=True)
        for number in range(2):
            Image.fromarray(person(pid, number, 0, (40, 80))).save(place / f"gallery/{pid}/{number}.png")
        Image.fromarray(person(pid, 5, 1, (40, 80))).save(place / f"query{pid}.png")
    (place / "gallery/broken.jpg").write_bytes(b"\xff\xd8 cut")
    return place


def test_search_ranks_the_gallery(place):
    model, queries = place / "model.safetensors", [place / "query0.png", place / "query1.png"]
    arguments = [f"--model={model}", f"--gallery={place / 'gallery'}", "--query", *queries, "--top=3"]
    done = run("search", *arguments, f"--out={place / 'results.json'}")
    assert done.returncode == 1 and "broken.jpg" in done.stderr  # an image was left out
    tree = json.loads((place / "results.json").read_text())
    assert tree["fingerprint"] == trained_model().fingerprint
    assert [query["path"] for query in tree["queries"]] == list(map(str, queries))
    gallery = sorted((place / "gallery").rglob("*.png"))
    similarity = trained_model().embed(queries) @ trained_model().embed(gallery).T
    for row, query in zip(similarity, tree["queries"], strict=True):
        expected = [gallery[i].relative_to(place / "gallery").as_posix() for i in np.argsort(-row)[:3]]
        assert [match["path"] for match in query["matches"]] == expected
        assert all(match["path"] in done.stdout for match in query["matches"])
        assert f"{query['matches'][0]['distance']:.4f}" in done.stdout
    assert "16 images, 16 of them" in done.stdout
    again = run("search", *arguments)
    assert "16 images, 0 of them" in again.stdout and again.stdout.splitlines()[1:] == done.stdout.splitlines()[1:]
    with pytest.raises(mpanet_jax.UserError, match=r"in float32.*in bfloat16"):
        mpanet_jax.Index.build(load(model, dtype="bfloat16"), place / "gallery")


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--out=results.txt"], "--out"),
        (["--top=0"], "--top"),
        (["--model=nowhere"], "nowhere"),
    ],
)
def test_search_names_bad_input(place, arguments, named):
    given = [
        f"--model={place / 'model.safetensors'}",
        f"--gallery={place / 'gallery'}",
        "--query",
        place / "query0.png",
    ]
    done = run("search", *given, *arguments)
    assert done.returncode == 2 and named in done.stderr and len(done.stderr.strip().splitlines()) == 1


def test_verify_before_and_after_a_calibration(place):
    model, pair = place / "model.safetensors", [place / "query0.png", place / "gallery/0/0.png"]
    a, b = trained_model().embed(pair)
    before = run("verify", f"--model={model}", *pair)
    assert before.returncode == 0 and f"similarity {a @ b:.4f}" in before.stdout and "no probability" in before.stdout

    files, pids = [], np.repeat(np.arange(30, 42), 4)
    images = [person(int(pid), n % 4, n % 2) for n, pid in enumerate(pids)]
    features, numbers = trained_model().embed(images, normalize=False), np.arange(len(pids)) % 2
    for part, rows in (("query", numbers == 1), ("gallery", numbers == 0)):
        paths = np.array([f"{part}{n}" for n in np.flatnonzero(rows)])
        files.append(place / f"{part}.npz")
        # Two cameras a modality, so that there are pairs of one modality too.
        camids = 1 + numbers[rows] + 2 * (np.arange(rows.sum()) % 2)
        save_embeddings(files[-1], Embeddings(features[rows], pids[rows], camids, paths, numbers[rows]))
    done = run("calibrate", f"--model={model}", "--features", *files, "--prior=0.2")
    assert done.returncode == 0, done.stderr
    assert "cross_modality" in done.stdout and "same_modality" in done.stdout and "cannot be told" in done.stdout
    path = place / "calibration.json"
    calibration = Calibration.read(path)
    assert (calibration.prior, calibration.fingerprint) == (0.2, trained_model().fingerprint)

    after = run("verify", f"--model={model}", *pair, "--modality=infrared,visible")
    expected = calibration.logistic("cross_modality").probability(float(a @ b), 0.2)
    assert f"probability {expected:.4g}"[:16] in after.stdout and "prior 0.2" in after.stdout
    path.unlink()


@pytest.mark.parametrize(
    "words, message",
    [
        (["verify.py", "none.png", "query0.png"], r"^none\.png: No such file or directory; give another image$"),
        (["search.py", "--gallery=gallery", "--query", "none.png"], "no query can be read"),
    ],
)
def test_images_that_are_not_there_are_named(place, monkeypatch, words, message):
    monkeypatch.chdir(place)
    with pytest.raises(Refused, match=message):
        run_here([f"scripts/{words[0]}", "--model=model.safetensors", *words[1:]])


def test_compare_is_what_embed_says(place):
    a, b = person(0, 0, 0), person(0, 1, 1)
    found = trained_model().compare(a, b, modality=["visible", "infrared"])
    rows = trained_model().embed([a, b])
    assert abs(found.similarity - rows[0] @ rows[1]) < 1e-6
    assert found.probability is None and found.kind == "cross_modality"


def test_page_s_code_searches_and_compares(place, monkeypatch, tmp_path):
    (tmp_path / "photos").mkdir()
    for number in range(4):
        Image.fromarray(person(number, 0, 0)).save(tmp_path / f"photos/{number}.png")
    Image.fromarray(person(2, 1, 1)).save(tmp_path / "query.jpg")
    for name in ("a", "b"):
        Image.fromarray(person(3, 1, 0)).save(tmp_path / f"{name}.jpg")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(mpanet_jax, "load", lambda source: trained_model(), raising=False)
    names = run_code("docs/search.md", 0, 1)
    assert len(names["results"].queries[0].matches) == 4 and (tmp_path / "results.json").exists()
    assert names["found"].similarity > 0.999 and names["found"].probability is None


def test_saved_model_takes_its_calibration_along(place, tmp_path):
    model = load(save_trained(tmp_path / "model.safetensors"))
    calibration = Calibration(model.source, model.fingerprint, "people", 0.5, 0, {}, {})
    calibration.write(calibration_path(model.source))
    model.save(tmp_path / "saved")
    assert Calibration.read(tmp_path / "saved/calibration.json").fingerprint == load(tmp_path / "saved").fingerprint
    dataclasses.replace(calibration, fingerprint="of earlier weights").write(calibration_path(model.source))
    model.save(tmp_path / "without")
    assert not (tmp_path / "without/calibration.json").exists()


def test_calibrate_a_run(place, tmp_path):
    convert(place / "model.safetensors", tmp_path / "run", drop_classifiers=True)
    raw, counts = tmp_path / "raw", {"num_train_ids": 6, "num_test_ids": 8, "images_per_camera": (2, 2)}
    write_dataset("sysu_mm01", raw, height=(48, 56), **counts)
    (tmp_path / "prepared").mkdir()
    data = {"dataset.source": str(raw), "dataset.data_dir": str(tmp_path / "prepared")}
    save_settings(replace(trained_model().settings, data), tmp_path / "run")
    done = run("calibrate", f"--workdir={tmp_path / 'run'}", "--seed=1")
    assert done.returncode == 0, done.stderr
    calibration = Calibration.read(tmp_path / "run/calibration.json")
    assert calibration.identities == {"calibration": 4, "test": 4} and calibration.data == "sysu_mm01"
    # All pairs of one identity in two rooms (cameras 2 and 3 are one), of the identities of both halves.
    found = {name: sum(v["same"] for v in (k["pairs"], k["test"]["pairs"])) for name, k in calibration.kinds.items()}
    expected = dict.fromkeys(("cross_modality", "same_modality"), 0)
    for pid in (raw / "exp/test_id.txt").read_text().split(","):
        shown = [(int(p.parts[-3][3]), p) for p in sorted(raw.glob(f"cam*/{int(pid):04}/*.jpg"))]
        for (one, _), (other, _) in itertools.combinations(shown, 2):
            if one != other and {one, other} != {2, 3}:
                expected["cross_modality" if (one in (3, 6)) != (other in (3, 6)) else "same_modality"] += 1
    assert found == expected
