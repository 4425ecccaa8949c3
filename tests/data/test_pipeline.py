import dataclasses
import errno
import gc
import io
import itertools
import multiprocessing
import os
import signal
import time
from multiprocessing.shared_memory import SharedMemory

import grain
import jax
import numpy as np
import pytest
from grain._src.python.ipc.shared_memory_array import SharedMemoryArray
from PIL import Image

from mpanet_jax.data import cache as cache_module
from mpanet_jax.data import cache_check
from mpanet_jax.data import grain_batches as grain_batches_module
from mpanet_jax.data.cache import cache_path, choose_cache, open_images
from mpanet_jax.data.cache_check import sums_path
from mpanet_jax.data.grain_batches import ResumableBatches, choose_num_workers
from mpanet_jax.data.pipeline import split_batches
from mpanet_jax.data.record_check import RecordCheck
from mpanet_jax.errors import UserError
from mpanet_jax.settings import DataSettings
from tests.data.toy import NUM_EPOCHS, SIZE, batch_hash, toy_feed, toy_plan, toy_split
from tests.limits import HANGS_AFTER

MODES = [("none", 0), ("none", 1), ("none", 3), ("none", -1), ("host", 0), ("host", -1), ("device", 0), ("auto", 0)]


DATA = DataSettings(**SIZE)
HOST = DataSettings(**SIZE, cache="host")
FILTERS = {"bilinear": Image.Resampling.BILINEAR, "lanczos": Image.Resampling.LANCZOS}


def pillow_resized(encoded, resize="bilinear"):
    image = Image.open(io.BytesIO(encoded)).convert("RGB")
    return np.asarray(image.resize((SIZE["width"], SIZE["height"]), FILTERS[resize]))


# Who resizes is chosen by the mode, and by which filter is handed to it: of Lanczos, one mode of each kind.
@pytest.mark.parametrize(
    ("resize", "modes"), [("bilinear", MODES), ("lanczos", [("none", 0), ("none", 1), ("host", 0), ("device", 0)])]
)
def test_all_modes_give_pillows_pixels_and_the_same_bits(tmp_path, resize, modes):
    split = toy_split()
    # A cache of the other filter lies there already.
    open_images(split, dataclasses.replace(HOST, resize=next(name for name in FILTERS if name != resize)), tmp_path)
    expected = np.stack([pillow_resized(encoded, resize) for encoded in split.encoded])
    hashes = {}
    for cache, num_workers in modes:
        feed = toy_feed(split, cache=cache, cache_dir=tmp_path, num_workers=num_workers, resize=resize)
        batches = list(feed.batches)
        feed.batches.close()
        assert (feed.images is not None) == (feed.cache == "device")
        hashes[cache, num_workers] = [batch_hash(batch, feed.images) for batch in batches]
        for batch in batches if feed.images is None else ():
            np.testing.assert_array_equal(batch["images"], expected[batch["index"]])
        if feed.images is not None:
            np.testing.assert_array_equal(feed.images, expected.reshape(len(split), SIZE["height"], -1))
    first, *others = hashes.values()
    assert len(first) == 21
    assert all(other == first for other in others)


def test_a_batch_is_what_the_plan_says():
    split = toy_split()
    feed = toy_feed(split, cache="none")
    expected = np.concatenate([toy_plan(split).epoch(epoch) for epoch in range(NUM_EPOCHS)])
    batches = list(feed.batches)
    assert len(batches) == NUM_EPOCHS * feed.steps_per_epoch == len(expected)
    for batch, index in zip(batches, expected, strict=True):
        np.testing.assert_array_equal(batch["index"], index)
        # pids 11, 21, ... are the labels 0, 1, ...
        np.testing.assert_array_equal(batch["labels"], (split.pids[index] - 11) // 10)
        np.testing.assert_array_equal(batch["modality"], split.modality[index])
        assert {batch[name].dtype for name in ("labels", "modality", "index")} == {np.dtype(np.int32)}
        assert batch["images"].dtype == np.uint8
        for image, i in zip(batch["images"], index, strict=True):
            np.testing.assert_array_equal(image, pillow_resized(split.encoded[i]))


def test_hosts_share_the_identity_slots():
    split = toy_split()
    whole = toy_feed(split, cache="none")
    shares = [toy_feed(split, cache="none", process_index=i, process_count=2) for i in range(2)]
    assert {share.steps_per_epoch for share in shares} == {whole.steps_per_epoch}
    assert {share.batch_size for share in shares} == {whole.batch_size} == {16}
    for all_of_it, *parts in itertools.islice(zip(whole.batches, *(s.batches for s in shares), strict=True), 5):
        for name, values in all_of_it.items():
            np.testing.assert_array_equal(values, np.concatenate([part[name] for part in parts]))
            assert len(parts[0][name]) == 8
    with pytest.raises(UserError, match=r"data\.num_ids_per_batch = 4 must be a multiple of the 3 .* next is 6"):
        toy_feed(split, cache="none", process_count=3)


def test_device_images_go_where_they_are_put(tmp_path):
    put = []
    feed = toy_feed(toy_split(), cache="device", put_images=lambda images: put.append(images) or "there")
    assert feed.images == "there"
    assert put[0].shape == (len(toy_split()), 24, 12 * 3)
    assert "images" not in next(feed.batches)


@pytest.mark.parametrize("room", [True, False])
def test_device_mode_does_not_need_the_disk(tmp_path, monkeypatch, capsys, room):
    if not room:
        monkeypatch.setattr(cache_module, "_free_disk", lambda path: 1000)
    feed = toy_feed(toy_split(), cache="device", cache_dir=tmp_path / "cache")
    assert feed.images.shape == (len(toy_split()), 24, 12 * 3)
    assert cache_path(toy_split(), DATA, tmp_path / "cache").exists() == room
    assert ("not kept for the next run" in capsys.readouterr().err) != room


@pytest.mark.parametrize("resize", FILTERS)
def test_evaluation_batches_have_one_shape_and_the_asked_order(resize):
    split = toy_split()
    indices = np.array([5, 3, 40, 7, 3, 0, 11])
    batches = list(split_batches(split, indices, DataSettings(**SIZE, resize=resize), batch_size=3))
    assert [batch["mask"].tolist() for batch in batches] == [[True] * 3, [True] * 3, [True, False, False]]
    assert {batch["images"].shape for batch in batches} == {(3, 24, 12, 3)}
    real = {name: np.concatenate([b[name][b["mask"]] for b in batches]) for name in batches[0]}
    np.testing.assert_array_equal(real["index"], indices)
    np.testing.assert_array_equal(real["pids"], split.pids[indices])
    np.testing.assert_array_equal(real["camids"], split.camids[indices])
    np.testing.assert_array_equal(real["modality"], split.modality[indices])
    assert {a.dtype for name, a in real.items() if name not in ("images", "mask")} == {np.dtype(np.int32)}
    for image, i in zip(real["images"], indices.tolist(), strict=True):
        np.testing.assert_array_equal(image, pillow_resized(split.encoded[i], resize))
    assert not batches[-1]["images"][1:].any()
    assert list(split_batches(split, [], DATA, batch_size=3)) == []


@pytest.mark.parametrize(("cache", "num_workers"), [("none", 0), ("none", 1), ("host", 0)])
def test_a_damaged_image_is_named_and_leaves_nothing(tmp_path, cache, num_workers):
    split = toy_split()
    split.encoded[17] = split.encoded[17][:150]
    with pytest.raises(UserError, match=r"image cam/0017\.jpg can't be decoded"):
        feed = toy_feed(split, cache=cache, cache_dir=tmp_path, num_workers=num_workers)
        list(feed.batches)
    assert not list(tmp_path.glob("*.npy*"))


def test_a_damaged_image_ends_an_evaluation():
    split = toy_split()
    split.encoded[17] = split.encoded[17][:150]
    with pytest.raises(UserError, match=r"image cam/0017\.jpg can't be decoded"):
        list(split_batches(split, np.arange(30), DATA, batch_size=4))


@pytest.mark.parametrize(
    ("cpus", "chosen"), [(1, 0), (2, 0), (4, 0), (7, 0), (8, 6), (15, 11), (16, 12), (32, 16), (128, 16)]
)
def test_many_cpus_decode_in_processes(monkeypatch, capsys, cpus, chosen):
    monkeypatch.setattr(grain_batches_module, "available_cpus", lambda: cpus)
    monkeypatch.setattr(grain_batches_module, "_free_shared_memory", lambda: chosen * 40 * 2**20)
    assert choose_num_workers(-1, 10 * 2**20) == chosen
    for asked in range(chosen + 1):
        assert choose_num_workers(asked, 10 * 2**20) == asked
    assert not capsys.readouterr().err


def test_short_shared_memory_is_found_before_a_worker_dies_of_it(monkeypatch, capsys):
    monkeypatch.setattr(grain_batches_module, "available_cpus", lambda: 16)
    monkeypatch.setattr(grain_batches_module, "_free_shared_memory", lambda: 64 * 2**20)
    assert choose_num_workers(-1, 18 * 2**20) == 0
    assert "decoded in threads, because 12 processes that decode need 864 MiB" in capsys.readouterr().err
    with pytest.raises(UserError, match=r"data\.num_workers = 2: .* need 144 MiB of .*, 64 are free"):
        choose_num_workers(2, 18 * 2**20)
    assert choose_num_workers(0, 2**40) == 0 and choose_num_workers(1, 16 * 2**20) == 1


class ReadInWorkers(list):
    """Encoded images that refuse to be read where they could claim an accelerator."""

    def __getitem__(self, i):
        assert multiprocessing.parent_process() is not None
        assert not jax._src.xla_bridge.backends_are_initialized()
        assert jax.config.jax_platforms == "cpu"
        return super().__getitem__(i)


def test_workers_leave_the_accelerator_alone_and_end_with_the_parent_only():
    split = toy_split()
    object.__setattr__(split, "encoded", ReadInWorkers(split.encoded))
    before = set(multiprocessing.active_children())
    feed = toy_feed(split, cache="none", num_workers=2)
    for _ in range(2):  # one of each worker: both are up
        next(feed.batches)
    workers = set(multiprocessing.active_children()) - before
    assert len(workers) == 2
    for worker in workers:  # as Ctrl-C does
        os.kill(worker.pid, signal.SIGINT)
    assert len(list(feed.batches)) == 19
    feed.batches.close()
    assert not any(worker.is_alive() for worker in workers)


def test_workers_start_before_a_batch_is_asked_for_and_end_if_none_is():
    before = set(multiprocessing.active_children())
    feed = toy_feed(toy_split(), cache="none", num_workers=2)
    feed.batches.start_processes()
    started = time.monotonic()
    while len(workers := set(multiprocessing.active_children()) - before) < 2:
        assert time.monotonic() - started < HANGS_AFTER
        time.sleep(0.01)
    feed.batches.close()  # while they start: none may come later
    assert not any(worker.is_alive() for worker in workers)
    assert set(multiprocessing.active_children()) <= before


def test_started_workers_go_on_where_a_checkpoint_says():
    feed, other = (toy_feed(toy_split(), cache="none", num_workers=number) for number in (2, 0))
    for _ in range(3):
        next(other.batches)
    feed.batches.start_processes()
    feed.batches.set_state(other.batches.get_state())
    feed.batches.start_processes()
    np.testing.assert_array_equal(next(feed.batches)["images"], next(other.batches)["images"])
    feed.batches.close()
    other.batches.start_processes()  # threads read: it does nothing
    other.batches.close()


class CountedReads(list):
    """Encoded images that count how often one is read."""

    reads = 0

    def __getitem__(self, i):
        self.reads += 1
        return super().__getitem__(i)


def counted(split):
    object.__setattr__(split, "encoded", CountedReads(split.encoded))
    return split


def test_the_host_cache_is_built_once(tmp_path):
    split = counted(toy_split())
    cache, images = open_images(split, HOST, tmp_path)
    first = np.array(images)
    assert cache == "host" and split.encoded.reads == len(split)
    _, again = open_images(split, HOST, tmp_path)
    assert isinstance(again, np.memmap)
    np.testing.assert_array_equal(again, first)
    assert split.encoded.reads == len(split)
    # Another size, another filter and other data are other files.
    assert open_images(split, DataSettings(10, 6, cache="host"), tmp_path)[1].shape[1:] == (10, 6, 3)
    _, lanczos = open_images(split, dataclasses.replace(HOST, resize="lanczos"), tmp_path)
    assert not np.array_equal(lanczos, first)
    object.__setattr__(split, "fingerprint", "toy1")
    open_images(split, HOST, tmp_path)
    assert split.encoded.reads == 4 * len(split)


def test_a_cache_of_other_pixels_is_left_alone(tmp_path):
    split = toy_split()
    old = tmp_path / "toy-train-toy0-24x12-v1.npy"  # as it was called when the pixels were not Pillow's
    np.save(old, np.zeros((len(split), 24, 12, 3), np.uint8))
    _, images = open_images(split, HOST, tmp_path)
    np.testing.assert_array_equal(images[3], pillow_resized(split.encoded[3]))


def test_the_cache_is_chosen_and_opened_once(tmp_path, monkeypatch):
    calls = []
    for name in ("choose_cache", "_open"):
        function = getattr(cache_module, name)
        counted = lambda *a, function=function, **k: calls.append(function.__name__) or function(*a, **k)  # noqa: E731
        monkeypatch.setattr(cache_module, name, counted)
    toy_feed(toy_split(), cache="host", cache_dir=tmp_path)
    assert calls == ["_open", "choose_cache", "_open"]  # once more under the lock: another process may have built it
    calls.clear()
    toy_feed(toy_split(), cache="host", cache_dir=tmp_path)
    assert calls == ["_open", "choose_cache"]


def test_the_remains_of_a_killed_build_are_no_cache(tmp_path):
    split = counted(toy_split())
    part = cache_path(split, HOST, tmp_path).with_suffix(".npy.part")
    part.write_bytes(b"half a file")
    assert len(open_images(split, HOST, tmp_path)[1]) == split.encoded.reads == len(split)
    assert not part.exists()


def test_a_cut_off_cache_is_built_again(tmp_path):
    split = toy_split()
    expected = np.array(open_images(split, HOST, tmp_path)[1])
    path = cache_path(split, HOST, tmp_path)
    path.write_bytes(path.read_bytes()[:-100])
    np.testing.assert_array_equal(open_images(split, HOST, tmp_path)[1], expected)


@pytest.mark.parametrize("mode", ["host", "device"])
def test_a_flipped_bit_in_the_cache_is_found_before_the_first_checkpoint(tmp_path, mode):
    split = toy_split()
    expected = np.array(open_images(split, HOST, tmp_path)[1])
    path = cache_path(split, HOST, tmp_path)
    toy_feed(split, cache=mode, cache_dir=tmp_path).require_sound_images()
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    feed = toy_feed(split, cache=mode, cache_dir=tmp_path)
    next(feed.batches)
    with pytest.raises(UserError, match=f"{path}: the image cache is damaged"):
        feed.require_sound_images()
    np.testing.assert_array_equal(open_images(split, HOST, tmp_path)[1], expected)  # built anew
    toy_feed(split, cache=mode, cache_dir=tmp_path).require_sound_images()


def test_checks_run_once_they_are_started_or_asked_for(tmp_path, monkeypatch):
    split, summed = counted(toy_split()), []
    open_images(split, HOST, tmp_path)
    sums = cache_check._sums
    monkeypatch.setattr(cache_check, "_sums", lambda file: summed.append(file) or sums(file))
    feed, read = toy_feed(split, cache="host", cache_dir=tmp_path), split.encoded.reads
    records = RecordCheck(split)
    assert not summed and split.encoded.reads == read
    for _ in range(2):
        feed.start_check()
        records.start()
    feed.require_sound_images()
    records.require()
    assert len(summed) == 1 and split.encoded.reads == read + len(split)


def test_a_cache_of_an_older_version_has_no_checksums_and_is_taken(tmp_path):
    split = toy_split()
    open_images(split, HOST, tmp_path)
    sums_path(cache_path(split, HOST, tmp_path)).unlink()
    toy_feed(split, cache="host", cache_dir=tmp_path).require_sound_images()
    toy_feed(split, cache="none").require_sound_images()


def test_a_cache_cut_off_during_the_run_does_not_kill_it(tmp_path):
    split = toy_split()
    feed = toy_feed(split, cache="host", cache_dir=tmp_path)
    next(feed.batches)
    os.truncate(cache_path(split, HOST, tmp_path), 4096)
    with pytest.raises(UserError, match="image cache was cut off during the run"):
        list(feed.batches)


def test_a_cache_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"dataset\.data_dir: can't write .*file/cache"):
        open_images(toy_split(), HOST, tmp_path / "file/cache")


def test_a_full_disk_is_found_before_the_work(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    split = counted(toy_split())
    with pytest.raises(UserError, match=r"dataset\.data_dir.*No space left .*set data\.cache = 'none'"):
        open_images(split, HOST, tmp_path)
    assert split.encoded.reads == 0
    assert not list(tmp_path.glob("*.npy*"))


GIB = 2**30


@pytest.mark.parametrize(
    ("device", "ram", "disk", "choice"),
    [
        (80, 64, 500, "device"),
        (8, 64, 500, "device"),  # half of it is just enough
        (7.9, 64, 500, "host"),
        (0, 64, 500, "host"),  # no accelerator
        (0, 7, 500, "none"),
        (0, 64, 7, "none"),
    ],
)
def test_auto_takes_the_fastest_mode_that_fits_and_says_so(tmp_path, monkeypatch, capsys, device, ram, disk, choice):
    monkeypatch.setattr(cache_module, "_free_device_memory", lambda: int(device * GIB))
    monkeypatch.setattr(cache_module, "free_ram", lambda: int(ram * GIB))
    monkeypatch.setattr(cache_module, "_free_disk", lambda path: int(disk * GIB))
    assert choose_cache("auto", 4 * GIB, tmp_path) == choice
    printed = capsys.readouterr().err
    assert f"cache={choice} chosen for 4.00 GiB" in printed and f"RAM {ram:.2f} GiB" in printed
    assert choose_cache("auto", 4 * GIB, tmp_path, built=True) == ("host" if disk == 7 else choice)


def test_an_unknown_cache_mode_is_named(tmp_path):
    with pytest.raises(UserError, match=r"data\.cache = 'disk' is unknown; .*'auto', 'device', 'host', 'none'"):
        choose_cache("disk", 1, tmp_path)


def test_batches_are_prepared_while_the_device_works():
    split = toy_split()
    reads = []

    class Recorded(list):
        def __getitem__(self, i):
            reads.append(i)
            return super().__getitem__(i)

    object.__setattr__(split, "encoded", Recorded(split.encoded))
    feed = toy_feed(split, cache="none")
    next(feed.batches)
    deadline = time.monotonic() + HANGS_AFTER
    while len(reads) < 2 * 16:  # the second batch, which nobody has asked for yet
        assert time.monotonic() < deadline
        time.sleep(0.01)
    feed.batches.close()


class BlockedSignals:
    """Element i says whether the process that reads it has been started with SIGINT and SIGTERM blocked."""

    def __len__(self):
        return 4

    def __getitem__(self, index):
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, [])
        return {"blocked": np.array({signal.SIGINT, signal.SIGTERM} <= blocked), "pid": np.array(os.getpid())}


@pytest.mark.parametrize("num_workers", [1, 2])
def test_ctrl_c_does_not_end_workers_that_start(num_workers):
    """It comes to all processes, and a new one has no handlers yet."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    batches = ResumableBatches(grain.MapDataset.source(BlockedSignals()), "", 1, num_workers)
    read = list(batches)
    batches.close()
    assert all(element["blocked"] for element in read)
    assert len({int(element["pid"]) for element in read} - {os.getpid()}) == num_workers
    assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == before


def test_shared_memory_of_a_dropped_batch_is_gone_at_once():
    """Also if the batch is in a reference cycle, as the last ones are: an exception's traceback holds them."""
    array = SharedMemoryArray((3, 4), np.uint8)
    name, metadata = array.metadata.name, array.metadata
    SharedMemoryArray.enable_async_del()  # as grain's iterators do
    cycle = {"batch": SharedMemoryArray.from_metadata(metadata)}
    cycle["batch"].unlink_on_del()
    cycle["itself"] = cycle
    del array, cycle
    gc.collect()
    with pytest.raises(FileNotFoundError):
        SharedMemory(name)
