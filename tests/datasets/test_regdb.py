import dataclasses
import io

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from mpanet_jax.datasets import INFRARED, VISIBLE, ImageRecord, open_split, regdb
from mpanet_jax.errors import UserError
from tests.datasets.by_name import list_images, load_split, prepare, prepared_dir


@pytest.fixture
def layout(tmp_path):
    """Two identities by hand; train is identity 285 in trial 3 and 7 in trial 4."""
    root = tmp_path / "RegDB"
    for folder, letter in (("Visible", "v"), ("Thermal", "t")):
        for pid in (7, 285):
            (root / folder / str(pid)).mkdir(parents=True)
            Image.new("RGB", (64, 128), (pid % 256, 1, 2)).save(root / folder / str(pid) / f"{letter} {pid}.bmp")
    (root / "idx").mkdir()
    for trial, pids in ((3, (285, 7)), (4, (7, 285))):
        for split, pid in zip(("train", "test"), pids, strict=True):
            for word, folder, letter in (("visible", "Visible", "v"), ("thermal", "Thermal", "t")):
                line = f"{folder}/{pid}/{letter} {pid}.bmp 0\n"
                (root / "idx" / f"{split}_{word}_{trial}.txt").write_text(line)
    return root


def test_identity_is_the_folder_and_the_camera_the_modality(layout):
    assert list_images("regdb", layout, "train", trial=3) == [
        ImageRecord("Visible/285/v 285.bmp", 285, 1, VISIBLE),
        ImageRecord("Thermal/285/t 285.bmp", 285, 2, INFRARED),
    ]
    assert [i.pid for i in list_images("regdb", layout, "train", trial=4)] == [7, 7]


@pytest.mark.parametrize(
    "line, fault",
    [
        ("../outside.bmp 0", r"1: '\.\./outside\.bmp' points outside"),
        ("Visible/../../x.bmp 0", "points outside"),
        ("/etc/x.bmp 0", "points outside"),
        ("Visible/285/none.bmp 0", "1: there is no image"),
        ("Visible/285/v 285.bmp", "1: expected 'path label'"),
        ("Visible/285/v 285.bmp 0\nVisible/285/v 285.bmp 0", "2: .* is listed twice"),
        ("Visible/²/v.bmp 0", "not of the form 'Visible/identity/name.bmp'"),
        (f"Visible/{'9' * 30}/v.bmp 0", "not of the form 'Visible/identity/name.bmp'"),
        ("Thermal/285/t 285.bmp 0", "not of the form 'Visible/identity/name.bmp'"),
        ("Visible/285/v 285.bmp 0\nVisible/7/v 7.bmp 0", "label 0 stands for the identities 285 and 7"),
    ],
)
def test_bad_index_lines(layout, line, fault):
    for folder in ("²", "9" * 30):
        (layout / "Visible" / folder).mkdir()
        (layout / "Visible" / folder / "v.bmp").touch()
    (layout.parent / "outside.bmp").write_bytes((layout / "Visible/285/v 285.bmp").read_bytes())
    (layout / "idx" / "train_visible_3.txt").write_text(line)
    with pytest.raises(UserError, match=f"train_visible_3.txt.*{fault}"):
        list_images("regdb", layout, "train", trial=3)


def test_suffix_case_on_disk_is_found(layout):
    (layout / "Visible/285/v 285.bmp").rename(layout / "Visible/285/v 285.BMP")
    assert list_images("regdb", layout, "train", trial=3)[0].path == "Visible/285/v 285.BMP"
    (layout / "idx" / "train_visible_3.txt").write_text("Visible/285/v 285.BMP 0\r\n")
    assert list_images("regdb", layout, "train", trial=3)[0].path == "Visible/285/v 285.BMP"


def test_ten_splits_are_prepared_apart(layout, tmp_path):
    for trial, pid in ((3, 285), (4, 7)):
        directory = prepare("regdb", layout, tmp_path / "data", trial=trial)
        assert directory == prepared_dir("regdb", tmp_path / "data", trial=trial)
        assert str(directory) == tfds.builder(f"regdb/split_{trial}", data_dir=tmp_path / "data").data_dir
        assert set(load_split("regdb", tmp_path / "data", "train", trial=trial).pids) == {pid}
    with pytest.raises(UserError, match=r"trial 5 is not prepared.*--trial 5"):
        load_split("regdb", tmp_path / "data", "train", trial=5)
    with pytest.raises(UserError, match="from 1 to 10"):
        prepare("regdb", layout, tmp_path / "data", trial=11)


def test_settings_open_their_own_split(layout, tmp_path):
    dataset = regdb.RegdbSettings(source=str(layout), data_dir=str(tmp_path / "data"), trial=4)
    assert set(open_split(dataset, "train").pids) == {7}  # prepared on demand
    assert set(open_split(dataclasses.replace(dataset, source=""), "test").pids) == {285}
    with pytest.raises(UserError, match=r"trial 3 is not prepared.*--trial 3"):
        open_split(dataclasses.replace(dataset, source="", trial=3), "train")


def test_bmp_becomes_lossless_png(tiny_sources, tmp_path):
    source = tiny_sources / "regdb"
    prepare("regdb", source, tmp_path)
    split = load_split("regdb", tmp_path, "train")
    assert len(split) == 4 * 20 and (split.modality == split.camids - 1).all()
    for i, path in enumerate(split.paths):
        png = Image.open(io.BytesIO(split.encoded[i]))
        assert png.format == "PNG"
        np.testing.assert_array_equal(np.asarray(png), np.asarray(Image.open(source / path)))
