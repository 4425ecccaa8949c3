import os
import pickle
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from mpanet_jax.errors import UserError
from tests.datasets.by_name import is_prepared, load_split, prepare, prepared_dir
from tests.limits import HANGS_AFTER

ROOT = Path(__file__).parents[2]
# Writes slowly, and tells the parent of every record that is on its way; stays at record number sys.argv[4].
SLOW = """
import sys, time
from tests.datasets.by_name import prepare
def track(items, description, total):
    for number, item in enumerate(items, start=1):
        if description.startswith("writing"):
            print("writing", flush=True)
            time.sleep(float(sys.argv[3]))
            while number == int(sys.argv[4]):
                time.sleep(1)
        yield item
prepare("sysu_mm01", sys.argv[1], sys.argv[2], track=track)
"""


def start(*arguments):
    environment = dict(os.environ, PYTHONPATH=str(ROOT))
    return subprocess.Popen(
        [sys.executable, *map(str, arguments)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def script(*arguments):
    process = start(ROOT / "scripts/prepare_data.py", *arguments)
    out, err = process.communicate(timeout=HANGS_AFTER)
    return process.returncode, out, err


def test_killed_midway_and_run_again(tiny_sources, tmp_path):
    source = tiny_sources / "sysu_mm01"
    process = start("-c", SLOW, source, tmp_path, 0.05, 6)
    for _ in range(5):
        process.stdout.readline()
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    remains = list(tmp_path.rglob("incomplete.*"))
    assert remains and not is_prepared("sysu_mm01", tmp_path)
    with pytest.raises(UserError, match="not prepared"):
        load_split("sysu_mm01", tmp_path, "train")

    prepare("sysu_mm01", source, tmp_path)
    prepare("sysu_mm01", source, tmp_path / "undisturbed")
    for name in ("train", "test"):
        again, expected = (load_split("sysu_mm01", d, name) for d in (tmp_path, tmp_path / "undisturbed"))
        assert list(again.paths) == list(expected.paths) and again.fingerprint == expected.fingerprint
        assert list(again.encoded) == list(expected.encoded)
    assert not list(tmp_path.rglob("incomplete.*"))


def test_two_runs_at_once_build_one_data_set(tiny_sources, tmp_path):
    processes = [start("-c", SLOW, tiny_sources / "sysu_mm01", tmp_path, 0.005, 0) for _ in range(2)]
    outputs = [process.communicate(timeout=HANGS_AFTER) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    assert sorted(bool(out) for out, _ in outputs) == [False, True]  # one wrote, the other waited
    assert is_prepared("sysu_mm01", tmp_path) and not list(tmp_path.rglob("incomplete.*"))


def test_a_failed_build_leaves_nothing(copy_of, tmp_path):
    source = copy_of("regdb")
    next(source.glob("Visible/*/*.bmp")).write_bytes(b"")
    with pytest.raises(UserError, match="empty file"):
        prepare("regdb", source, tmp_path / "data", verify=False)
    assert not [p for p in (tmp_path / "data").rglob("*") if "array_record" in p.name or "incomplete" in p.name]


def test_a_directory_of_something_else_is_not_overwritten(tiny_sources, tmp_path):
    target = prepared_dir("llcm", tmp_path)
    target.mkdir(parents=True)
    (target / "mine.txt").write_text("keep")
    with pytest.raises(UserError, match="delete it"):
        prepare("llcm", tiny_sources / "llcm", tmp_path)
    assert (target / "mine.txt").read_text() == "keep"


def test_prepared_data_need_no_source(tiny_sources, tmp_path):
    assert prepare("llcm", tiny_sources / "llcm", tmp_path) == prepare("llcm", None, tmp_path)
    for source, field in ((None, r"dataset\.data_dir"), (tmp_path / "none", r"dataset\.source")):
        with pytest.raises(UserError, match=f"{field}.*python scripts/prepare_data.py --dataset sysu_mm01 --source"):
            prepare("sysu_mm01", source, tmp_path)
    with pytest.raises(UserError, match=r"dataset\.name = 'market': expected one of 'sysu_mm01', 'regdb'"):
        prepare("market", tmp_path, tmp_path)
    with pytest.raises(UserError, match="split 'val'"):
        load_split("llcm", tmp_path, "val")


def test_fingerprint_follows_every_pixel_and_label(copy_of, tmp_path):
    source = copy_of("llcm")
    prepare("llcm", source, tmp_path / "before")
    test_images = sorted(source.glob("test_vis/cam*/*/*.jpg"))
    test_images[0].write_bytes(test_images[-1].read_bytes())
    prepare("llcm", source, tmp_path / "after")
    train = [load_split("llcm", tmp_path / d, "train").fingerprint for d in ("before", "after")]
    test = [load_split("llcm", tmp_path / d, "test").fingerprint for d in ("before", "after")]
    assert train[0] == train[1] and test[0] != test[1] and train[0] != test[0]


def test_split_is_picklable_and_safe_in_threads(tiny_sources, tmp_path):
    prepare("sysu_mm01", tiny_sources / "sysu_mm01", tmp_path)
    split = load_split("sysu_mm01", tmp_path, "train")
    expected = [(tiny_sources / "sysu_mm01" / path).read_bytes() for path in split.paths]
    copied = pickle.loads(pickle.dumps(split))
    barrier = threading.Barrier(8)

    def read_all(offset):
        barrier.wait()
        order = [(i + offset) % len(copied) for i in range(len(copied))]
        return all(copied.encoded[i] == expected[i] for i in order)

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(read_all, range(8)))


def test_script_builds_then_says_so(tiny_sources, tmp_path):
    arguments = ("--dataset", "regdb", "--source", tiny_sources / "regdb", "--data_dir", tmp_path, "--trial")
    code, out, err = script(*arguments, "2", "--check")
    assert code == 0 and "no faults" in out and not list(tmp_path.iterdir()), err
    assert "warning:" in err and "published are 206, 2,060 and 2,060" in err
    before = os.times()
    code, out, err = script(*arguments, "all")
    after = os.times()
    assert code == 0 and out.count("prepared:") == 10 and "Traceback" not in err
    # Of the processors' time, which is the same on a busy machine.
    assert after.children_user + after.children_system - before.children_user - before.children_system < 60
    assert len(load_split("regdb", tmp_path, "test", trial=10)) == 3 * 20
    code, out, _ = script(*arguments, "7")
    assert code == 0 and "already prepared" in out


def test_script_lists_all_faults_and_exits_with_2(copy_of, tmp_path):
    source = copy_of("sysu_mm01")
    broken = sorted(source.glob("cam1/*/*.jpg"))[:2]
    for path in broken:
        path.write_bytes(b"")
    code, _, err = script("--dataset", "sysu_mm01", "--source", source, "--data_dir", tmp_path / "data")
    assert code == 2 and "Traceback" not in err and not (tmp_path / "data").exists()
    assert all(f"error: {path}: empty file" in err for path in broken) and "2 fault(s); nothing was built" in err
    code, _, err = script("--dataset", "regdb", "--source", source, "--trial", "12")
    assert code == 2 and "--trial 12: expected 1 to 10 or 'all'" in err
    (tmp_path / "file").write_text("")
    code, _, err = script("--dataset", "llcm", "--source", copy_of("llcm"), "--data_dir", tmp_path / "file")
    assert code == 2 and "error: --data_dir: cannot make" in err


def test_many_shards_keep_the_order(tiny_sources, tmp_path, monkeypatch):
    source = tiny_sources / "llcm"
    prepare("llcm", source, tmp_path / "one")
    monkeypatch.setattr("mpanet_jax.datasets.builder.IMAGES_PER_SHARD", 7)
    directory = prepare("llcm", source, tmp_path / "many")
    for name in ("train", "test"):
        one, many = (load_split("llcm", tmp_path / d, name) for d in ("one", "many"))
        assert len(list(directory.glob(f"llcm-{name}.array_record*"))) == -(-len(one) // 7) > 2
        assert one.fingerprint == many.fingerprint and list(one.paths) == list(many.paths)
        assert [many.encoded[i] for i in range(len(many))] == [(source / path).read_bytes() for path in many.paths]


def test_records_that_do_not_belong_to_the_index(tiny_sources, tmp_path):
    directory = prepare("llcm", tiny_sources / "llcm", tmp_path)
    (directory / "index_test.npz").replace(directory / "index_train.npz")
    (directory / "index_test.npz").write_bytes((directory / "index_train.npz").read_bytes())
    with pytest.raises(UserError, match="records and index differ"):
        load_split("llcm", tmp_path, "train")


@pytest.mark.parametrize("damage", ["records cut off", "records gone", "index"])
def test_damaged_files_are_named_when_the_split_is_opened(tiny_sources, tmp_path, damage):
    directory = prepare("llcm", tiny_sources / "llcm", tmp_path)
    records = next(directory.glob("llcm-train.array_record*"))
    if damage == "records cut off":
        os.truncate(records, records.stat().st_size // 2)
    elif damage == "records gone":
        records.unlink()
    else:
        (directory / "index_train.npz").write_bytes(b"cut off")
    with pytest.raises(UserError, match=rf"{directory}: .*train.* damaged .*; delete the directory and prepare"):
        load_split("llcm", tmp_path, "train")


def test_prepared_data_say_that_they_are_of_another_source(tiny_sources, tmp_path, capsys):
    source = tiny_sources / "llcm"
    directory = prepare("llcm", source, tmp_path)
    prepare("llcm", source, tmp_path)
    prepare("llcm", None, tmp_path)
    assert not capsys.readouterr().err
    prepare("llcm", tmp_path / "elsewhere", tmp_path)
    assert f"{directory} was prepared from {source.absolute()}; dataset.source = " in capsys.readouterr().err


def test_data_dir_that_cannot_be_made(tiny_sources, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"dataset\.data_dir: cannot make"):
        prepare("llcm", tiny_sources / "llcm", tmp_path / "file")
