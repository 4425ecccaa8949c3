import pytest
import tensorflow_datasets as tfds

from mpanet_jax.datasets import INFRARED, VISIBLE, ImageRecord
from mpanet_jax.errors import UserError
from tests.datasets.by_name import list_images, load_split, prepare


@pytest.fixture
def layout(tmp_path):
    root = tmp_path / "LLCM"
    for word, cameras in (("vis", range(1, 10)), ("nir", (1, 2, 4, 5, 6, 7, 8, 9))):
        for camid in cameras:
            (root / f"test_{word}" / f"cam{camid}" / "0002").mkdir(parents=True)
    files = ["vis/0001/0001_c09_s1_f2_vis.jpg", "vis/0001/0001_c01_s1_f2_vis.jpg", "nir/0001/0001_c02_s1_f2_nir.jpg"]
    files += ["test_vis/cam3/0002/b.jpg", "test_vis/cam3/0002/a.JPG", "test_nir/cam9/0002/c.jpg"]
    for file in files:
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        (root / file).touch()
    (root / "idx").mkdir()
    (root / "idx/train_vis.txt").write_text(f"{files[0]} 0\n{files[1]} 0\n")
    (root / "idx/train_nir.txt").write_text(f"{files[2]} 0\n")
    (root / "idx/test_id.txt").write_text("2\n")
    return root


def test_train_comes_from_the_index_and_test_from_the_folders(layout):
    assert list_images("llcm", layout, "train") == [
        ImageRecord("vis/0001/0001_c01_s1_f2_vis.jpg", 1, 1, VISIBLE),
        ImageRecord("nir/0001/0001_c02_s1_f2_nir.jpg", 1, 2, INFRARED),
        ImageRecord("vis/0001/0001_c09_s1_f2_vis.jpg", 1, 9, VISIBLE),
    ]
    assert list_images("llcm", layout, "test") == [
        ImageRecord("test_vis/cam3/0002/a.JPG", 2, 3, VISIBLE),
        ImageRecord("test_vis/cam3/0002/b.jpg", 2, 3, VISIBLE),
        ImageRecord("test_nir/cam9/0002/c.jpg", 2, 9, INFRARED),
    ]


def test_faults_name_file_and_fix(layout):
    (layout / "idx/test_id.txt").write_text("2,8")
    with pytest.raises(UserError, match=r"test_id\.txt: identity 8 has no images"):
        list_images("llcm", layout, "test")
    numbers = "vis/²/1_c1_1.jpg", f"vis/{'9' * 30}/1_c1_1.jpg", "vis/1/1_c12345678901_1.jpg"
    for path in ("vis/0001/no camera.jpg", *numbers):
        (layout / path).parent.mkdir(exist_ok=True)
        (layout / path).touch()
        (layout / "idx/train_vis.txt").write_text(f"{path} 0", encoding="utf-8")
        with pytest.raises(UserError, match=f"train_vis.txt: '{path}' is not of the form"):
            list_images("llcm", layout, "train")


def test_prepared_records_are_the_source_files(tiny_sources, tmp_path):
    source = tiny_sources / "llcm"
    assert str(prepare("llcm", source, tmp_path)) == tfds.builder("llcm", data_dir=tmp_path).data_dir
    train, test = (load_split("llcm", tmp_path, split) for split in ("train", "test"))
    assert set(test.paths) == {str(p.relative_to(source)) for p in source.glob("test_*/cam*/*/*")}
    assert len(set(train.pids)) == 4 and len(set(test.pids)) == 3 and not set(train.pids) & set(test.pids)
    for split in (train, test):
        assert all(split.encoded[i] == (source / path).read_bytes() for i, path in enumerate(split.paths))
        assert all(("nir" in path) == bool(m) for path, m in zip(split.paths, split.modality, strict=True))
