"""What evaluation will read is looked at before training, and what other people's files hold is answered in a line."""

import io
import os
from pathlib import Path

import numpy as np
import pytest

from mpanet_jax import datasets, embeddings
from mpanet_jax.checkpoint import Checkpoints
from mpanet_jax.data import cache
from mpanet_jax.data.record_check import RecordCheck
from mpanet_jax.datasets.prepared import read_index
from mpanet_jax.datasets.synthetic import write_dataset
from mpanet_jax.embeddings import load_embeddings
from mpanet_jax.errors import UserError
from mpanet_jax.evaluation.evaluate import evaluate
from mpanet_jax.evaluation.given_images import rows_of_images
from mpanet_jax.evaluation.images import list_images
from mpanet_jax.evaluation.workdir import evaluate_workdir
from mpanet_jax.methods.mpanet import MPANetSettings
from mpanet_jax.modality import INFRARED, VISIBLE
from mpanet_jax.run_files import save_settings
from mpanet_jax.settings import DataSettings
from mpanet_jax.settings_base import replace
from tests.datasets.by_name import prepare, prepared_dir, settings
from tests.fuzz import READERS


@pytest.fixture(scope="module")
def raw(tmp_path_factory):
    folder = tmp_path_factory.mktemp("raw") / "sysu"
    write_dataset("sysu_mm01", folder, num_train_ids=4, num_test_ids=3, images_per_camera=(2, 3), height=(32, 40))
    return folder


@pytest.fixture
def prepared(raw, tmp_path):
    prepare("sysu_mm01", raw, tmp_path / "data")
    return settings("sysu_mm01", tmp_path / "data")


def test_cut_permutation_file_is_found_when_the_test_set_is_opened(prepared):
    assert len(datasets.open_evaluation(prepared).split) > 0
    file = datasets.prepared_dir(prepared) / "rand_perm_cam.mat"
    os.truncate(file, file.stat().st_size // 2)
    with pytest.raises(UserError, match=f"{file}: no readable MATLAB 5 file"):
        datasets.open_evaluation(prepared)


def damage_an_image(path):
    data = bytearray(path.read_bytes())
    data[data.rindex(b"\xff\xd8\xff") + 100] ^= 1  # in a JPEG file
    path.write_bytes(data)


@pytest.mark.parametrize("split", ["train", "test"])
def test_damaged_record_is_found_in_the_background_and_names_an_image(prepared, split):
    RecordCheck(datasets.load_split(prepared, split)).require()
    (records,) = datasets.prepared_dir(prepared).glob(f"*-{split}.array_record*")
    opened = datasets.load_split(prepared, split)
    damage_an_image(records)
    with pytest.raises(UserError, match=r"image cam\d/\d+/\d+\.jpg can't be read, its record .* is damaged"):
        RecordCheck(opened).require()


@pytest.mark.parametrize(
    "content", ["{", "", "[]", '{"splits": 5}', '{"name": "x", "splits": [{"shardLengths": "y"}]}']
)
def test_damaged_dataset_info_is_named(prepared, content):
    (datasets.prepared_dir(prepared) / "dataset_info.json").write_text(content)
    with pytest.raises(UserError, match=f"^{prepared_dir('sysu_mm01', prepared.data_dir)}: "):
        datasets.load_split(prepared, "test")


def test_named_pipes_and_links_to_themselves_cost_their_own_rows(raw, tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    image = next(raw.glob("cam1/*/0001.jpg"))
    (folder / "b.jpg").symlink_to(image)
    os.mkfifo(folder / "a.jpg")
    (folder / "loop").symlink_to(folder / "loop")
    (folder / "loop.jpg").symlink_to(folder / "loop.jpg")
    images = list_images(folder)
    assert [image.path for image in images] == ["a.jpg", "b.jpg", "loop.jpg"]
    files, options = [image.file for image in images], {"batch_size": 3, "errors": "skip"}
    (rows,), (pipe, loop) = rows_of_images(lambda x, _: x, files, np.zeros(3), DataSettings(32, 16), **options)
    assert len(rows) == 1
    assert pipe == (0, f"{folder}/a.jpg", "not a file") and loop[:2] == (2, f"{folder}/loop.jpg")


def write_npz(path, **changes):
    numbers = np.arange(3)
    arrays = {"features": np.eye(3, 4), "pids": numbers, "camids": numbers, "paths": np.array(["a", "b", "c"])}
    np.savez(path, **(arrays | changes))
    return path


def test_zero_vectors_and_repeated_paths_are_warned_of(tmp_path, capsys):
    load_embeddings(write_npz(tmp_path / "sound.npz"))
    assert capsys.readouterr().err == ""
    odd = write_npz(tmp_path / "odd.npz", features=np.diag([1.0, 0, 0]), paths=np.array(["a", "b", "a"]))
    load_embeddings(odd)
    first, second = capsys.readouterr().err.splitlines()
    assert first.startswith(f"warning: {odd}: 2 rows of features are all zero, first that of b")
    assert second.startswith(f"warning: {odd}: 1 paths come more than once, first a")


@pytest.mark.parametrize("name", ["paths", "pid_names"])
def test_names_that_are_no_text_are_refused(tmp_path, name):
    path = write_npz(tmp_path / "bytes.npz", **{name: np.array([b"a", b"b\xff", b"c"])})
    with pytest.raises(UserError, match=f"^{path}: {name} holds bytes that are not UTF-8; save it as text$"):
        load_embeddings(path)
    beyond = np.array([97, 0x110000, 99], np.uint32).view("<U1")  # Unicode ends before
    path = write_npz(tmp_path / "text.npz", **{name: beyond})
    with pytest.raises(UserError, match=f"^{path}: {name} holds characters that there are not; save it as text$"):
        load_embeddings(path)


ODD_FOLDERS = {
    "digits": "9" * 5000,
    "digits where an identity would be": "cam1/" + "9" * 5000,
    "bytes": "é".encode(),
    "a file name that is no UTF-8": "\udcff",
}


@pytest.mark.parametrize("protocol", ["sysu_mm01_random", "regdb", "llcm", "query_gallery"])
@pytest.mark.parametrize("odd", ODD_FOLDERS.values(), ids=ODD_FOLDERS)
def test_paths_may_be_called_anything(tmp_path, odd, protocol):
    infrared = 2 if protocol == "regdb" else 6

    def images(name, folder, camera, modality, seed):
        end = b"/%d.jpg" if isinstance(folder, bytes) else "/%d.jpg"
        return write_npz(
            tmp_path / f"{name}.npz",
            features=np.random.default_rng(seed).normal(size=(8, 4)),
            pids=np.arange(8) % 3,
            camids=np.full(8, camera),
            modality=np.full(8, modality),
            paths=np.array([folder + end % number for number in range(8)]),
        )

    of_folder = [
        evaluate(
            images("query", folder, infrared, INFRARED, seed=0),
            images("gallery", folder, 1, VISIBLE, seed=1),
            protocol=protocol,
        )
        for folder in ("images", odd)
    ]
    assert of_folder[0] == of_folder[1]


def test_archive_that_unpacks_to_more_than_the_free_memory_is_refused(tmp_path, monkeypatch):
    path = tmp_path / "bomb.npz"
    np.savez_compressed(path, features=np.zeros((1000, 1000)), pids=np.zeros(1), camids=np.zeros(1), paths=["a"])
    monkeypatch.setattr(embeddings, "free_ram", lambda: 4 << 20)
    assert path.stat().st_size < 1 << 20
    with pytest.raises(UserError, match=f"{path}: needs 7 MiB of memory, 4 MiB are free"):
        load_embeddings(path)


def test_foreign_workdir_prepares_no_data_elsewhere(raw, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    run = replace(MPANetSettings(), {"dataset.source": str(raw), "dataset.data_dir": str(elsewhere)})
    save_settings(run, tmp_path / "run")
    with pytest.raises(UserError, match=f"{tmp_path}/run: its config.json would prepare data in {elsewhere}.*data_dir"):
        evaluate_workdir(tmp_path / "run")
    assert not elsewhere.exists()


def test_data_dir_that_is_only_read_needs_no_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "_free_device_memory", lambda: 0)
    assert cache.choose_cache("auto", 1000, tmp_path / "cache") == "host"
    monkeypatch.setattr(os, "access", lambda path, mode: not mode & os.W_OK)  # root may write everywhere
    assert cache.choose_cache("auto", 1000, tmp_path / "cache") == "none"
    assert cache.choose_cache("auto", 1000, tmp_path / "cache", built=True) == "host"


@pytest.mark.parametrize("name", ["checkpoints", "checkpoints_best", "checkpoints_damaged"])
def test_file_in_the_place_of_checkpoints_is_found_at_the_start(tmp_path, name):
    (Path(tmp_path) / name).touch()
    with pytest.raises(UserError, match=f"{tmp_path}/{name}: not a folder"):
        Checkpoints(tmp_path, keep=1)


@pytest.mark.parametrize(
    "change",
    [
        {"pids": np.ones(3)},
        {"camids": np.arange(2)},
        {"modality": np.zeros((3, 1), int)},
        {"paths": np.array([b"a", b"b", b"c"])},
        {"paths": np.array([97, 0x110000, 99], np.uint32).view("<U1")},
        {"parts": np.array(["a", "b"])},
        {"pid_names": np.arange(3)},
        {"fingerprint": np.array("../../x")},
        {"fingerprint": np.array("")},
    ],
)
def test_index_of_other_arrays_is_refused(tmp_path, change):
    _, sound, _ = READERS["prepared"]
    with np.load(io.BytesIO(sound)) as arrays:
        np.savez(tmp_path / "index_test.npz", **{**arrays, **change})
    with pytest.raises(UserError, match=rf"^{tmp_path}: index_test\.npz is damaged \(.+\); delete the directory and"):
        read_index(tmp_path / "index_test.npz")


def test_no_flipped_bit_in_an_index_gets_through(tmp_path):
    _, sound, _ = READERS["prepared"]
    path = tmp_path / "index_train.npz"
    path.write_bytes(sound)
    expected = read_index(path)
    refused = 0
    for place in range(len(sound)):
        path.write_bytes(sound[:place] + bytes([sound[place] ^ 1]) + sound[place + 1 :])
        try:
            found = read_index(path)
        except UserError as error:
            assert str(error).startswith(f"{tmp_path}: index_train.npz is damaged (")
            refused += 1
        else:  # a date in it, say
            assert all(np.array_equal(found[name], expected[name]) for name in expected)
    assert refused > len(sound) / 2
