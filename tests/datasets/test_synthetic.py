"""The drawn data sets: their layouts on disk, their determinism, and what infrared does not tell."""

import hashlib
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import scipy.io
from PIL import Image

from mpanet_jax.datasets.synthetic import write_contact_sheet, write_dataset
from mpanet_jax.datasets.synthetic_images import draw_image
from mpanet_jax.datasets.synthetic_people import draw_person
from mpanet_jax.errors import UserError

TINY = dict(num_train_ids=9, num_test_ids=4, images_per_camera=(1, 3))
VISIBLE_CAMERAS, INFRARED_CAMERAS = (1, 2, 4, 5), (3, 6)


def digests(root):
    return {
        str(p.relative_to(root)): hashlib.sha256(p.read_bytes()).hexdigest() for p in root.rglob("*") if p.is_file()
    }


def id_list(path):
    lines = path.read_text().splitlines()
    assert len(lines) == 1
    return [int(pid) for pid in lines[0].split(",")]


@pytest.fixture(scope="module")
def sysu(tmp_path_factory):
    root = tmp_path_factory.mktemp("raw") / "sysu"
    count = write_dataset(
        "sysu_mm01", root, num_train_ids=30, num_test_ids=10, images_per_camera=(1, 4), height=(64, 80)
    )
    return root, count


@pytest.fixture(scope="module")
def regdb(tmp_path_factory):
    root = tmp_path_factory.mktemp("raw") / "regdb"
    write_dataset("regdb", root, num_train_ids=5, num_test_ids=4, images_per_camera=(2, 3))
    return root


@pytest.fixture(scope="module")
def llcm(tmp_path_factory):
    root = tmp_path_factory.mktemp("raw") / "llcm"
    write_dataset("llcm", root, height=(64, 80), **TINY)
    return root


def test_sysu_folders_and_lists(sysu):
    root, count = sysu
    assert {p.name for p in root.iterdir()} == {"cam1", "cam2", "cam3", "cam4", "cam5", "cam6", "exp"}
    lists = {name: id_list(root / f"exp/{name}_id.txt") for name in ("train", "val", "test", "available")}
    assert len(lists["train"]) + len(lists["val"]) == 30
    assert len(lists["test"]) == 10
    assert sorted(lists["train"] + lists["val"] + lists["test"]) == lists["available"]
    assert len(set(lists["available"])) == 40
    files = list(root.glob("cam*/*/*"))
    assert len(files) == count
    for folder in root.glob("cam*/*"):
        assert folder.name == f"{int(folder.name):04d}"
        names = sorted(p.name for p in folder.iterdir())
        assert names == [f"{n:04d}.jpg" for n in range(1, len(names) + 1)]
    assert {int(folder.name) for folder in root.glob("cam*/*")} == set(lists["available"])
    with Image.open(files[0]) as image:
        assert (image.format, image.mode) == ("JPEG", "RGB")


def test_sysu_counts_are_uneven_and_cameras_are_missed(sysu):
    root, _ = sysu
    counts = Counter((int(p.parts[-3][3:]), int(p.parts[-2])) for p in root.glob("cam*/*/*"))
    pids = {pid for _, pid in counts}
    assert len(set(counts.values())) > 2
    assert len(counts) < 6 * len(pids)
    for pid in pids:
        assert sum((camid, pid) in counts for camid in VISIBLE_CAMERAS) >= 2
        assert sum((camid, pid) in counts for camid in INFRARED_CAMERAS) >= 1


def test_sysu_permutation_file_matches_the_files(sysu):
    root, _ = sysu
    cameras = scipy.io.loadmat(root / "exp/rand_perm_cam.mat")["rand_perm_cam"]
    assert cameras.shape == (6, 1)
    trials_differ = False
    for camid, (cells,) in enumerate(cameras, start=1):
        assert cells.dtype == object
        assert cells.shape[1] == 1
        assert cells.shape[0] >= max(id_list(root / "exp/available_id.txt"))
        for pid, (rows,) in enumerate(cells, start=1):
            count = len(list(root.glob(f"cam{camid}/{pid:04d}/*.jpg")))
            assert rows.dtype == np.uint8
            assert rows.shape == (10, count)
            assert (np.sort(rows, axis=1) == np.arange(1, count + 1)).all()
            trials_differ |= count > 1 and len({tuple(row) for row in rows}) > 1
    assert trials_differ


def test_regdb_layout(regdb):
    assert {p.name for p in regdb.iterdir()} == {"Visible", "Thermal", "idx"}
    assert len(list((regdb / "idx").iterdir())) == 40
    for file in regdb.glob("*/*/*"):
        with Image.open(file) as image:
            assert (image.format, image.mode, image.size) == ("BMP", "RGB", (64, 128))
    assert file.read_bytes()[28:30] == (24).to_bytes(2, "little")  # bits a pixel
    splits = set()
    for trial in range(1, 11):
        members = {}
        for split, number in (("train", 5), ("test", 4)):
            labels = {}
            for kind in ("visible", "thermal"):
                lines = [
                    line.rsplit(" ", 1) for line in (regdb / f"idx/{split}_{kind}_{trial}.txt").read_text().splitlines()
                ]
                listed = [path for path, _ in lines]
                pids = {int(path.split("/")[1]) for path in listed}
                on_disk = {
                    f"{kind.title()}/{pid}/{p.name}"
                    for pid in pids
                    for p in (regdb / kind.title() / str(pid)).iterdir()
                }
                assert set(listed) == on_disk
                assert len(listed) == len(on_disk)
                labels[kind] = {(int(path.split("/")[1]), int(label)) for path, label in lines}
            assert labels["visible"] == labels["thermal"]
            assert sorted(label for _, label in labels["visible"]) == list(range(number))
            members[split] = {pid for pid, _ in labels["visible"]}
        assert not members["train"] & members["test"]
        splits.add(frozenset(members["test"]))
    assert len(splits) > 1


def test_llcm_layout(llcm):
    assert {p.name for p in llcm.iterdir()} == {"idx", "vis", "nir", "test_vis", "test_nir"}
    test = id_list(llcm / "idx/test_id.txt")
    assert len(test) == 4
    labels = {}
    for kind in ("vis", "nir"):
        lines = [line.split(" ") for line in (llcm / f"idx/train_{kind}.txt").read_text().splitlines()]
        assert {path for path, _ in lines} == {str(p.relative_to(llcm)) for p in llcm.glob(f"{kind}/*/*.jpg")}
        labels[kind] = {int(Path(path).name[:4]): int(label) for path, label in lines}
        assert {int(folder.name) for folder in llcm.glob(f"test_{kind}/cam*/*")} == set(test)
    assert labels["vis"] == labels["nir"]
    assert sorted(labels["vis"].values()) == list(range(9))
    assert not set(labels["vis"]) & set(test)
    assert {p.name for p in llcm.glob("test_nir/*")} <= {f"cam{c}" for c in (1, 2, 4, 5, 6, 7, 8, 9)}


def test_small_default_sizes(monkeypatch, tmp_path):
    # The drawing is not needed to count the images.
    blank = Image.new("RGB", (8, 8))
    monkeypatch.setattr("mpanet_jax.datasets.synthetic.draw_image", lambda *args, **kwargs: blank)
    for layout in ("sysu_mm01", "regdb", "llcm"):
        assert 2200 <= write_dataset(layout, tmp_path / layout) <= 2800
    assert len(id_list(tmp_path / "sysu_mm01/exp/test_id.txt")) >= 24
    assert len(id_list(tmp_path / "llcm/idx/test_id.txt")) >= 24


def test_same_seed_same_bytes_whatever_the_workers(tmp_path):
    for name, seed, workers in (("a", 3, 0), ("b", 3, 2), ("c", 4, 0)):
        write_dataset("sysu_mm01", tmp_path / name, seed=seed, workers=workers, height=(48, 60), **TINY)
    a, b, c = (digests(tmp_path / name) for name in "abc")
    assert a == b
    assert not {path for path in a.keys() & c.keys() if path.endswith("jpg") and a[path] == c[path]}
    assert len(set(a.values())) == len(a)


@pytest.mark.parametrize("fixture, pattern", [("sysu", "cam{}/*/*"), ("regdb", "{}/*/*"), ("llcm", "{}/*/*")])
def test_infrared_is_grey_and_visible_is_not(fixture, pattern, request):
    root = request.getfixturevalue(fixture)
    root = root[0] if isinstance(root, tuple) else root
    folders = {"sysu": ("3", "1"), "regdb": ("Thermal", "Visible"), "llcm": ("nir", "vis")}[fixture]
    for folder, grey in zip(folders, (True, False), strict=True):
        for file in sorted(root.glob(pattern.format(folder)))[:8]:
            pixels = np.asarray(Image.open(file)).astype(int)
            assert pixels.ndim == 3
            assert (np.ptp(pixels, axis=2) == 0).all() == grey


def test_infrared_reflectance_says_nothing_about_colour():
    """Over 400 identities no material's infrared grey correlates with its visible colour or luminance.

    5 / sqrt(n) is five standard errors of a correlation of independent values. That the pixels follow the palette is
    the next test.
    """
    palettes = np.stack([draw_person(11, pid).palette for pid in range(1, 401)]).astype(float)
    for material in range(2, 16):
        infrared, visible = palettes[:, 1, material, 0], palettes[:, 0, material]
        assert infrared.std() > 10
        for channel in (*visible.T, visible @ [0.299, 0.587, 0.114]):
            assert channel.std() > 10
            assert abs(np.corrcoef(infrared, channel)[0, 1]) < 5 / np.sqrt(400)


def test_brightness_of_the_drawn_torso_does_not_match_across_modalities():
    torso = (slice(34, 50), slice(18, 30))

    def mean(pid, camid, modality):
        args = dict(camid=camid, scene=camid, modality=modality, number=1, size=(48, 128))
        return np.asarray(draw_image(5, pid, **args))[torso].mean()

    pids = range(1, 201)
    visible_1, visible_2 = ([mean(pid, camid, 0) for pid in pids] for camid in (1, 4))
    infrared_1, infrared_2 = ([mean(pid, camid, 1) for pid in pids] for camid in (3, 6))
    assert abs(np.corrcoef(visible_1, infrared_1)[0, 1]) < 0.21  # three standard errors
    assert abs(np.corrcoef(visible_2, infrared_2)[0, 1]) < 0.21  # three standard errors
    assert np.corrcoef(visible_1, visible_2)[0, 1] > 0.21  # within a modality it does
    assert np.corrcoef(infrared_1, infrared_2)[0, 1] > 0.21


def test_people_differ():
    looks = [
        tuple(value for name, value in vars(draw_person(0, pid)).items() if name not in ("palette", "height", "build"))
        for pid in range(1, 501)
    ]
    assert len(set(looks)) == 500


def test_full_scale_takes_the_counts_of_a_permutation_file(sysu, tmp_path, monkeypatch):
    root, count = sysu
    exp = tmp_path / "exp"
    exp.mkdir()
    permutation = exp / "rand_perm_cam.mat"
    permutation.write_bytes((root / "exp/rand_perm_cam.mat").read_bytes())
    with pytest.raises(UserError, match=r"train_id\.mat"):
        write_dataset("sysu_mm01", tmp_path / "full", scale="full", permutation=permutation)
    for name in ("train", "test"):
        scipy.io.savemat(exp / f"{name}_id.mat", {"id": np.array([id_list(root / f"exp/{name}_id.txt")], np.uint16)})
    blank = Image.new("RGB", (8, 8))
    monkeypatch.setattr("mpanet_jax.datasets.synthetic.draw_image", lambda *args, **kwargs: blank)
    assert write_dataset("sysu_mm01", tmp_path / "full", scale="full", permutation=permutation, seed=9) == count
    paths = {str(p.relative_to(root)) for p in root.rglob("*")}
    assert paths == {str(p.relative_to(tmp_path / "full")) for p in (tmp_path / "full").rglob("*")}
    for name in ("rand_perm_cam.mat", "train_id.txt", "val_id.txt", "test_id.txt", "available_id.txt"):
        assert (tmp_path / "full/exp" / name).read_bytes() == (root / "exp" / name).read_bytes()


def test_bench_scale_has_sysu_mm01s_identities_in_every_camera(tmp_path, monkeypatch):
    plans = []
    monkeypatch.setattr("mpanet_jax.datasets.synthetic._write", lambda plan, *_: plans.append(plan))
    assert write_dataset("sysu_mm01", tmp_path / "bench", scale="bench") == 20_608
    counts = Counter((image.camid, image.pid) for image in plans[0].images)
    assert len({pid for _, pid in counts}) == 491
    assert len(counts) == 6 * 491
    assert set(counts.values()) == set(range(4, 11))
    assert {image.height for image in plans[0].images} == set(range(150, 201))
    with pytest.raises(UserError, match="bench"):
        write_dataset("regdb", tmp_path / "new", scale="bench")


def test_refuses_what_it_cannot_do(tmp_path):
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken/file").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for out in ("taken", "file"):
        with pytest.raises(UserError, match="remove it or name another"):
            write_dataset("sysu_mm01", tmp_path / out, **TINY)
    with pytest.raises(UserError, match="layout"):
        write_dataset("market", tmp_path / "new")
    with pytest.raises(UserError, match="permutation"):
        write_dataset("sysu_mm01", tmp_path / "new", permutation=tmp_path / "file")
    with pytest.raises(UserError, match="permutation"):
        write_dataset("sysu_mm01", tmp_path / "new", scale="full", permutation=tmp_path / "file")
    with pytest.raises(UserError, match="images_per_camera"):
        write_dataset("sysu_mm01", tmp_path / "new", images_per_camera=(3, 2))
    with pytest.raises(UserError, match="height"):
        write_dataset("regdb", tmp_path / "new", height=(64, 64))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "taken"]
    assert (tmp_path / "taken/file").read_text() == "mine"


def test_nothing_is_left_when_it_fails_half_way(tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("mpanet_jax.datasets.synthetic.draw_image", fail)
    with pytest.raises(KeyboardInterrupt):
        write_dataset("regdb", tmp_path / "new", num_train_ids=2, num_test_ids=1)
    assert list(tmp_path.iterdir()) == []


def test_an_empty_folder_is_taken(tmp_path):
    assert write_dataset("regdb", tmp_path, num_train_ids=2, num_test_ids=1, images_per_camera=(1, 1)) == 6
    assert (tmp_path / "idx/train_visible_1.txt").exists()


def test_contact_sheet(tmp_path):
    write_contact_sheet(tmp_path / "sheet.jpg", num_people=2, height=60)
    with Image.open(tmp_path / "sheet.jpg") as sheet:
        assert sheet.format == "JPEG"
        assert sheet.size[1] == 60


def test_script_exits_with_2_and_one_line(tmp_path):
    script = Path(__file__).parents[2] / "scripts/make_synthetic.py"
    (tmp_path / "taken").write_text("mine")
    result = subprocess.run(
        [sys.executable, script, "--out", tmp_path / "taken"], capture_output=True, text=True, check=False
    )
    assert result.returncode == 2
    assert len(result.stderr.strip().splitlines()) == 1
    assert "remove it or name another" in result.stderr
