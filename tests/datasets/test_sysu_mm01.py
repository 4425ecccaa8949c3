from pathlib import Path

import numpy as np
import pytest
import scipy.io
import tensorflow_datasets as tfds

from mpanet_jax.datasets import INFRARED, VISIBLE, ImageRecord
from mpanet_jax.errors import UserError
from tests.datasets.by_name import list_images, load_split, make_dataset, prepare


def make_layout(root: Path, files: list[str], lists: dict[str, str]) -> Path:
    """Empty files and identity lists: list_images looks at names only."""
    for camid in range(1, 7):
        (root / f"cam{camid}").mkdir(parents=True)
    for file in files:
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        (root / file).touch()
    (root / "exp").mkdir()
    for name, text in lists.items():
        (root / "exp" / name).write_text(text)
    return root


LISTS = {"train_id.txt": "12,3\n", "val_id.txt": "7", "test_id.txt": "5\n"}


def test_lists_train_and_val_identities_by_identity_camera_and_name(tmp_path):
    files = ["cam6/0003/0001.jpg", "cam1/0003/0002.jpg", "cam1/0003/0001.jpg", "cam3/0012/0001.jpg"]
    files += ["cam2/0012/0010.jpg", "cam5/0007/0001.jpg", "cam1/0005/0001.jpg", "cam3/0005/0001.jpg"]
    files += ["cam1/0099/0001.jpg", "cam1/0003/.DS_Store", "cam1/0003/Thumbs.db"]  # an unlisted identity, other files
    source = make_layout(tmp_path / "raw", files, LISTS)
    assert list_images("sysu_mm01", source, "train") == [
        ImageRecord("cam1/0003/0001.jpg", 3, 1, VISIBLE, "train"),
        ImageRecord("cam1/0003/0002.jpg", 3, 1, VISIBLE, "train"),
        ImageRecord("cam6/0003/0001.jpg", 3, 6, INFRARED, "train"),
        ImageRecord("cam5/0007/0001.jpg", 7, 5, VISIBLE, "val"),
        ImageRecord("cam2/0012/0010.jpg", 12, 2, VISIBLE, "train"),
        ImageRecord("cam3/0012/0001.jpg", 12, 3, INFRARED, "train"),
    ]
    assert [(i.camid, i.modality) for i in list_images("sysu_mm01", source, "test")] == [(1, VISIBLE), (3, INFRARED)]


def test_names_with_spaces_other_letters_and_upper_case_suffixes(tmp_path):
    names = ["0001.JPG", "0002 (copy).jpg", "0003-größe-人.JpEg"]
    source = make_layout(tmp_path / "with space ü", [f"cam1/0005/{n}" for n in names], LISTS)
    assert [i.path for i in list_images("sysu_mm01", source, "test")] == [f"cam1/0005/{n}" for n in names]


@pytest.mark.parametrize(
    "text, fault",
    [
        ("5,5", "listed twice"),
        ("5,x", "'x' is not an identity number"),
        ("5,0", "'0' is not"),
        (" \n", "no identities"),
    ],
)
def test_bad_identity_lists(tmp_path, text, fault):
    source = make_layout(tmp_path / "raw", ["cam1/0005/0001.jpg"], LISTS | {"test_id.txt": text})
    with pytest.raises(UserError, match=f"test_id.txt.*{fault}"):
        list_images("sysu_mm01", source, "test")


def test_prepared_records_are_the_source_files(tiny_sources, tmp_path):
    source = tiny_sources / "sysu_mm01"
    directory = prepare("sysu_mm01", source, tmp_path)
    assert directory == Path(tfds.builder("sysu_mm01", data_dir=tmp_path).data_dir)
    for name, lists in {"train": ("train_id", "val_id"), "test": ("test_id",)}.items():
        pids = [int(p) for file in lists for p in (source / "exp" / f"{file}.txt").read_text().split(",")]
        files = sorted(p for p in source.glob("cam*/*/*.jpg") if int(p.parent.name) in pids)
        split = load_split("sysu_mm01", tmp_path, name)
        assert sorted(split.paths) == [str(p.relative_to(source)) for p in files]
        assert len(split.encoded) == len(split) == len(files)
        for i, path in enumerate(split.paths):
            assert split.encoded[i] == (source / path).read_bytes()
            assert path.startswith(f"cam{split.camids[i]}/{split.pids[i]:04d}/")
            assert split.modality[i] == (1 if split.camids[i] in (3, 6) else 0)
        assert split.pids.dtype == split.camids.dtype == split.modality.dtype == np.int32
    assert (directory / "rand_perm_cam.mat").read_bytes() == (source / "exp" / "rand_perm_cam.mat").read_bytes()


def test_tfds_reads_the_records(tiny_sources, tmp_path):
    builder = tfds.builder("sysu_mm01", data_dir=tmp_path / "tfds")
    config = tfds.download.DownloadConfig(manual_dir=tiny_sources / "sysu_mm01")
    builder.download_and_prepare(download_dir=tmp_path, download_config=config)
    split = load_split("sysu_mm01", tmp_path / "tfds", "train")
    records = builder.as_data_source("train", decoders={"image": tfds.decode.SkipDecoding()})
    for i in (0, len(split) - 1):
        assert set(records[i]) == {"image", "pid", "camid", "modality", "path"}
        assert (records[i]["pid"], records[i]["camid"]) == (split.pids[i], split.camids[i])
        assert (records[i]["modality"], records[i]["path"].decode()) == (split.modality[i], split.paths[i])


def permutation_mat(path: Path, rows: dict[tuple[int, int], np.ndarray]) -> None:
    cameras = np.empty((6, 1), object)
    for camid in range(1, 7):
        cells = np.empty((5, 1), object)
        for pid in range(1, 6):
            cells[pid - 1, 0] = rows.get((camid, pid), np.empty((10, 0), np.uint8))
        cameras[camid - 1, 0] = cells
    scipy.io.savemat(path, {"rand_perm_cam": cameras})


GOOD = np.tile(np.array([2, 1], np.uint8), (10, 1))


@pytest.mark.parametrize(
    "rows, fault",
    [
        ({(1, 5): GOOD, (3, 5): GOOD[:, :1] // 2}, None),
        ({(1, 5): np.tile(np.array([3, 1, 2], np.uint8), (10, 1)), (3, 5): GOOD[:, :1] // 2}, "3 images of cam1/0005"),
        ({(1, 5): GOOD}, "0 images of cam3/0005, which has 1"),
        ({(1, 5): GOOD, (3, 5): GOOD[:, :1] // 2, (6, 5): GOOD}, "2 images of cam6/0005, which has 0"),
        ({(1, 5): GOOD[:9], (3, 5): GOOD[:, :1] // 2}, r"rand_perm_cam{1}{5} must be 10xn"),
        ({(1, 5): GOOD * 0 + 1, (3, 5): GOOD[:, :1] // 2}, r"rand_perm_cam{1}{5} must be 10xn, each row a permutation"),
        (None, "no readable MATLAB 5 file"),
    ],
)
def test_permutation_against_the_files_present(tmp_path, rows, fault):
    source = make_layout(tmp_path / "raw", ["cam1/0005/0001.jpg", "cam1/0005/0002.jpg", "cam3/0005/0001.jpg"], LISTS)
    path = source / "exp" / "rand_perm_cam.mat"
    path.write_text("not MATLAB's") if rows is None else permutation_mat(path, rows)
    faults = []
    make_dataset("sysu_mm01").check_source(source, {"test": list_images("sysu_mm01", source, "test")}, faults.append)
    if fault is None:
        assert faults == []
    else:
        assert len(faults) == 1 and str(path) in faults[0] and fault in faults[0]


@pytest.mark.parametrize("name", ["0003.jpg", "0002 copy.jpg", "2.JPG", "02.jpg"])
def test_permutation_refers_to_images_by_number(tmp_path, name):
    files = ["cam1/0005/0001.jpg", f"cam1/0005/{name}", "cam3/0005/0001.jpg"]
    source = make_layout(tmp_path / "raw", files, LISTS)
    permutation_mat(source / "exp" / "rand_perm_cam.mat", {(1, 5): GOOD, (3, 5): GOOD[:, :1] // 2})
    faults = []
    make_dataset("sysu_mm01").check_source(source, {"test": list_images("sysu_mm01", source, "test")}, faults.append)
    if name in ("2.JPG", "02.jpg"):
        assert faults == []
    else:
        assert len(faults) == 1 and f"{source}/cam1/0005: " in faults[0] and name[:-4] in faults[0]


def test_test_set_without_permutation_file(copy_of, tmp_path):
    source = copy_of("sysu_mm01")
    (source / "exp" / "rand_perm_cam.mat").unlink()
    for verify in (True, False):
        with pytest.raises(UserError, match=r"exp/rand_perm_cam\.mat: file missing"):
            prepare("sysu_mm01", source, tmp_path / "data", verify=verify)
