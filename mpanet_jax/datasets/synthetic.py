"""Writes a synthetic data set of drawn people in a real data set's exact on-disk layout.

Which images there are is decided first and in one place (`_plan_*`: identities, cameras, counts, sizes, side files);
the images are then drawn by any number of processes. Every image depends on (seed, identity, camera, number) only, so
the same seed gives byte-identical files for any number of workers. The drawing itself is in `synthetic_people.py`.
"""

import io
import multiprocessing
import os
import shutil
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import scipy.io
from PIL import Image
from scipy.io.matlab import MatReadError

from mpanet_jax.datasets.llcm import CAMERAS as LLCM_CAMERAS
from mpanet_jax.datasets.schema import INFRARED, VISIBLE
from mpanet_jax.datasets.synthetic_people import draw_image
from mpanet_jax.datasets.sysu_mm01 import CAMERAS as SYSU_CAMERAS
from mpanet_jax.datasets.sysu_mm01 import load_permutation
from mpanet_jax.errors import UserError
from mpanet_jax.protocol import NUM_TRIALS

SYSU_SCENES = {1: 1, 2: 2, 3: 2, 4: 4, 5: 5, 6: 6}  # cameras 2 and 3 share a room

# (layout, scale) -> identities for training (SYSU-MM01: train + val) and testing, images an identity and camera,
# image height in pixels (drawn between the two; RegDB's images are all 64x128), and how often an identity misses a
# camera.
_SIZES = {
    ("sysu_mm01", "small"): dict(train=204, test=32, images=(1, 3), height=(120, 152), missing=0.12),
    ("sysu_mm01", "bench"): dict(train=395, test=96, images=(4, 10), height=(150, 200), missing=0.0),
    ("sysu_mm01", "full"): dict(train=395, test=96, images=(4, 30), height=(180, 400), missing=0.12),
    ("regdb", "small"): dict(train=63, test=63, images=(10, 10), height=(128, 128)),
    ("regdb", "full"): dict(train=206, test=206, images=(10, 10), height=(128, 128)),
    ("llcm", "small"): dict(train=76, test=28, images=(1, 3), height=(120, 152), missing=0.3),
    ("llcm", "full"): dict(train=713, test=351, images=(1, 6), height=(180, 400), missing=0.3),
}


@dataclass(frozen=True)
class _Image:
    """One image to draw; `scene` is the place a camera looks at, which two cameras may share."""

    path: str
    pid: int
    camid: int
    scene: int
    modality: int
    number: int
    width: int
    height: int


@dataclass
class _Plan:
    """All that a data set consists of: images to draw and small files to write."""

    images: list[_Image] = field(default_factory=list)
    files: dict[str, bytes] = field(default_factory=dict)


def write_dataset(
    layout: str,
    out: str | os.PathLike,
    *,
    seed: int = 0,
    scale: str = "small",
    permutation: str | os.PathLike | None = None,
    workers: int = 0,
    num_train_ids: int | None = None,
    num_test_ids: int | None = None,
    images_per_camera: tuple[int, int] | None = None,
    height: tuple[int, int] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> int:
    """Draw a data set of people into the new folder `out`, in the real data set's on-disk layout.

    Args:
      layout: 'sysu_mm01', 'regdb' or 'llcm'.
      out: the folder to make; it must not exist, or be empty. It appears only when it is complete.
      seed: the same seed gives byte-identical files, whatever `workers` is.
      scale: 'small' (about 2,500 images), 'full' (the real data set's numbers of identities and like image sizes) or,
        for SYSU-MM01, 'bench' (its identities, all in every camera, with few and small images: 20,608 with seed 0).
      permutation: SYSU-MM01 at full scale only: its rand_perm_cam.mat, whose counts are taken (45,863 images); the
        id lists train_id.mat and test_id.mat lie beside it. The file is copied to exp/rand_perm_cam.mat.
      workers: processes that draw; 0 draws in this one.
      num_train_ids, num_test_ids: other numbers of identities (SYSU-MM01: train and val together).
      images_per_camera: (fewest, most) images of an identity in a camera.
      height: (lowest, highest) image height in pixels; RegDB's is 128 always.
      progress: called with (images drawn, images in all) now and then.

    Returns:
      the number of images written.

    Raises:
      UserError: an unknown layout or scale, sizes that make no sense, an unreadable permutation, a taken `out`.
    """
    if (layout, scale) not in _SIZES:
        raise UserError(
            f"layout={layout!r}, scale={scale!r}: expected layout sysu_mm01, regdb or llcm and scale small or full, "
            "or layout sysu_mm01 and scale bench"
        )
    size = dict(_SIZES[layout, scale])
    given = dict(train=num_train_ids, test=num_test_ids, images=images_per_camera, height=height)
    size.update({name: value for name, value in given.items() if value is not None})
    if seed < 0:
        raise UserError(f"seed={seed}: expected 0 or more")
    if size["train"] < 2 or size["test"] < 1:
        raise UserError(f"num_train_ids={size['train']}, num_test_ids={size['test']}: expected at least 2 and 1")
    if not 1 <= size["images"][0] <= size["images"][1]:
        raise UserError(f"images_per_camera={size['images']}: expected (fewest, most) with 1 <= fewest <= most")
    if not 32 <= size["height"][0] <= size["height"][1]:
        raise UserError(f"height={size['height']}: expected (lowest, highest) with 32 <= lowest <= highest")
    if permutation is not None and (layout, scale) != ("sysu_mm01", "full"):
        raise UserError(
            "permutation: only layout sysu_mm01 at scale full takes one; leave it out or ask for scale full"
        )
    if layout == "regdb" and tuple(size["height"]) != (128, 128):
        raise UserError("height: RegDB's images are 64x128; leave height out")

    rng = np.random.default_rng([seed, sum(layout.encode())])
    if layout == "sysu_mm01":
        plan = _plan_sysu_mm01(rng, size, permutation)
    elif layout == "regdb":
        plan = _plan_regdb(rng, size)
    else:
        plan = _plan_llcm(rng, size)
    _write(plan, Path(out), seed, workers, progress)
    return len(plan.images)


# --- the three layouts ---


def _plan_sysu_mm01(rng: np.random.Generator, size: dict, permutation: str | os.PathLike | None) -> _Plan:
    """cam{1..6}/{id:04d}/{n:04d}.jpg, four id lists of one line, and the permutation file of the protocol."""
    plan = _Plan()
    if permutation is not None:
        counts, train, val, test = _read_sysu_structure(Path(permutation))
        plan.files["exp/rand_perm_cam.mat"] = Path(permutation).read_bytes()
    else:
        ids = _draw_ids(rng, size["train"] + size["test"])
        num_val = size["train"] // 4
        order = rng.permutation(ids)
        test, val, train = np.split(order, [size["test"], size["test"] + num_val])
        counts = _draw_counts(rng, ids, SYSU_CAMERAS, size["images"], size["missing"])
        plan.files["exp/rand_perm_cam.mat"] = _permutation_file(rng, counts, max(ids))
    for name, ids in {"train": train, "val": val, "test": test, "available": [*train, *val, *test]}.items():
        plan.files[f"exp/{name}_id.txt"] = (",".join(str(pid) for pid in sorted(ids)) + "\n").encode()
    for (camid, pid), count in sorted(counts.items()):
        for n in range(1, count + 1):
            path = f"cam{camid}/{pid:04d}/{n:04d}.jpg"
            width, height = _draw_size(rng, size["height"])
            plan.images.append(_Image(path, pid, camid, SYSU_SCENES[camid], SYSU_CAMERAS[camid], n, width, height))
    return plan


def _plan_regdb(rng: np.random.Generator, size: dict) -> _Plan:
    """{Visible,Thermal}/{id}/*.bmp of 64x128, and idx/{train,test}_{visible,thermal}_{1..10}.txt: a split a trial."""
    plan = _Plan()
    ids = list(range(1, size["train"] + size["test"] + 1))
    paths: dict[tuple[str, int], list[str]] = {}
    for camid, (folder, modality) in enumerate([("Visible", VISIBLE), ("Thermal", INFRARED)], start=1):
        for pid in ids:
            for n in range(1, int(rng.integers(size["images"][0], size["images"][1] + 1)) + 1):
                path = f"{folder}/{pid}/drawn_{folder[0].lower()}_{n:05d}_{pid}.bmp"
                paths.setdefault((folder, pid), []).append(path)
                plan.images.append(_Image(path, pid, camid, 1 + n % 5, modality, n, 64, 128))
    for trial in range(1, NUM_TRIALS + 1):
        train, test = np.split(rng.permutation(ids), [size["train"]])
        for split, members in {"train": train, "test": test}.items():
            for folder in ("Visible", "Thermal"):
                lines = [
                    f"{path} {label}\n" for label, pid in enumerate(sorted(members)) for path in paths[folder, pid]
                ]
                plan.files[f"idx/{split}_{folder.lower()}_{trial}.txt"] = "".join(lines).encode()
    return plan


def _plan_llcm(rng: np.random.Generator, size: dict) -> _Plan:
    """idx/train_{vis,nir}.txt over {vis,nir}/{id:04d}/*, idx/test_id.txt over test_{vis,nir}/cam{c}/{id:04d}/*."""
    plan = _Plan()
    order = rng.permutation(_draw_ids(rng, size["train"] + size["test"]))
    train, test = sorted(order[: size["train"]].tolist()), sorted(order[size["train"] :].tolist())
    cameras = {(camid, modality): modality for modality, camids in LLCM_CAMERAS.items() for camid in camids}
    counts = _draw_counts(rng, train + test, cameras, size["images"], size["missing"])
    label = {pid: index for index, pid in enumerate(train)}
    lines: dict[int, list[str]] = {VISIBLE: [], INFRARED: []}
    for ((camid, modality), pid), count in sorted(counts.items(), key=lambda item: (item[0][1], item[0][0])):
        kind = "nir" if modality == INFRARED else "vis"
        for n in range(1, count + 1):
            name = f"{pid:04d}_c{camid:02d}_s{rng.integers(10**6):06d}_f{n:05d}_{kind}.jpg"
            path = f"{kind}/{pid:04d}/{name}" if pid in label else f"test_{kind}/cam{camid}/{pid:04d}/{name}"
            if pid in label:
                lines[modality].append(f"{path} {label[pid]}\n")
            width, height = _draw_size(rng, size["height"])
            plan.images.append(_Image(path, pid, camid, camid, modality, n, width, height))
    plan.files["idx/train_vis.txt"] = "".join(lines[VISIBLE]).encode()
    plan.files["idx/train_nir.txt"] = "".join(lines[INFRARED]).encode()
    plan.files["idx/test_id.txt"] = (",".join(map(str, test)) + "\n").encode()
    return plan


# --- their parts ---


def _draw_ids(rng: np.random.Generator, count: int) -> list[int]:
    """`count` identities with gaps in their numbers, as the real lists have."""
    return sorted((rng.permutation(count + count // 10)[:count] + 1).tolist())


def _draw_counts(
    rng: np.random.Generator, ids: list[int], cameras: dict, images: tuple[int, int], missing: float
) -> dict:
    """Images of each (camera, identity), uneven; an identity misses a camera at the given rate.

    `cameras` maps a camera's key to its modality. Everybody keeps an infrared and two visible cameras, so that
    every query has a match in another room.
    """
    counts = {}
    for pid in ids:
        present = [key for key in cameras if rng.random() >= missing]
        for modality, fewest in ((VISIBLE, 2), (INFRARED, 1)):
            of_modality = [key for key in cameras if cameras[key] == modality]
            absent = [key for key in of_modality if key not in present]
            present += absent[: max(0, fewest - (len(of_modality) - len(absent)))]
        for key in sorted(present):
            counts[key, pid] = int(rng.integers(images[0], images[1] + 1))
    return counts


def _draw_size(rng: np.random.Generator, height: tuple[int, int]) -> tuple[int, int]:
    """(width, height) in pixels of an image, as a person detector would cut it: the proportions vary."""
    rows = int(rng.integers(height[0], height[1] + 1))
    return round(rows * rng.uniform(0.36, 0.44)), rows


def _permutation_file(rng: np.random.Generator, counts: dict, num_cells: int) -> bytes:
    """rand_perm_cam.mat: a 6x1 cell of Nx1 cells of uint8 10xn, each row a 1-based permutation of n images."""
    cameras = np.empty((len(SYSU_CAMERAS), 1), dtype=object)
    for camid in SYSU_CAMERAS:
        cells = np.empty((num_cells, 1), dtype=object)
        for pid in range(1, num_cells + 1):
            count = counts.get((camid, pid), 0)
            rows = [rng.permutation(count) + 1 for _ in range(NUM_TRIALS)]
            cells[pid - 1, 0] = np.array(rows, dtype=np.uint8).reshape(NUM_TRIALS, count)
        cameras[camid - 1, 0] = cells
    buffer = io.BytesIO()
    scipy.io.savemat(buffer, {"rand_perm_cam": cameras}, do_compression=True)
    # The first 116 bytes are free text, in which SciPy puts the time: a fixed text keeps the file the same every time.
    return b"MATLAB 5.0 MAT-file, drawn by mpanet_jax".ljust(116) + buffer.getvalue()[116:]


def _read_sysu_structure(permutation: Path) -> tuple[dict, list[int], list[int], list[int]]:
    """Counts by (camera, identity) from the real rand_perm_cam.mat, and the train, val and test identities.

    The val list is not beside it: it is the rest of the identities that both modalities saw. (22 identities were seen
    in one modality only; their images are on disk and in no list.)
    """
    try:
        counts = {key: rows.shape[1] for key, rows in load_permutation(permutation).items()}
        train, test = (
            sorted(int(pid) for pid in scipy.io.loadmat(permutation.parent / f"{name}_id.mat")["id"].ravel())
            for name in ("train", "test")
        )
    except (UserError, OSError, LookupError, ValueError, TypeError, NotImplementedError, MatReadError) as error:
        raise UserError(
            f"permutation={permutation}: expected SYSU-MM01's rand_perm_cam.mat with train_id.mat and test_id.mat "
            f"beside it; copy all three from the data set's exp folder ({error})"
        ) from None
    seen = {modality: {p for c, p in counts if SYSU_CAMERAS[c] == modality} for modality in (VISIBLE, INFRARED)}
    val = sorted((seen[VISIBLE] & seen[INFRARED]) - set(train) - set(test))
    return counts, train, val, test


# --- drawing and writing ---


def _write(plan: _Plan, out: Path, seed: int, workers: int, progress: Callable[[int, int], None] | None) -> None:
    """Write the plan into a new folder beside `out`, and rename it to `out` when it is complete."""
    out = out.absolute()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"out={out}: exists and is not an empty folder; remove it or name another")
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".partial", dir=out.parent))
    try:
        for path, content in plan.files.items():
            (partial / path).parent.mkdir(parents=True, exist_ok=True)
            (partial / path).write_bytes(content)
        for folder in sorted({os.path.dirname(image.path) for image in plan.images}):
            (partial / folder).mkdir(parents=True, exist_ok=True)
        chunks = [plan.images[start : start + 64] for start in range(0, len(plan.images), 64)]
        done = 0
        for count in _draw_all(chunks, partial, seed, workers):
            done += count
            if progress:
                progress(done, len(plan.images))
        partial.chmod(0o755)  # mkdtemp makes it private
        os.replace(partial, out)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _draw_all(chunks: list[list[_Image]], root: Path, seed: int, workers: int):
    """Draw the chunks in this process or in `workers` ones, yielding the number of images of each finished chunk."""
    if workers <= 0:
        for chunk in chunks:
            yield _draw_chunk(root, seed, chunk)
        return
    # Spawned, not forked: the calling process may hold JAX's threads.
    pool = ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn"))
    try:
        for future in [pool.submit(_draw_chunk, root, seed, chunk) for chunk in chunks]:
            yield future.result()
    finally:
        pool.shutdown(cancel_futures=True)


def _draw_chunk(root: Path, seed: int, images: list[_Image]) -> int:
    for image in images:
        drawn = draw_image(
            seed,
            image.pid,
            camid=image.camid,
            scene=image.scene,
            modality=image.modality,
            number=image.number,
            size=(image.width, image.height),
        )
        if image.path.endswith(".bmp"):
            drawn.save(root / image.path)
        else:
            drawn.save(root / image.path, quality=90)
    return len(images)


# --- the contact sheet ---


def write_contact_sheet(path: str | os.PathLike, *, seed: int = 0, num_people: int = 12, height: int = 176) -> None:
    """Write a JPEG of the seed's first people, in two columns: the visible cameras, then the infrared ones."""
    width, gap = round(0.4 * height), 4
    cameras = sorted(SYSU_CAMERAS, key=lambda camid: (SYSU_CAMERAS[camid], camid))
    lefts = [c * (width + gap) + (2 * gap if SYSU_CAMERAS[camid] == INFRARED else 0) for c, camid in enumerate(cameras)]
    column, rows = lefts[-1] + width + 6 * gap, (num_people + 1) // 2
    sheet = Image.new("RGB", (2 * column - 6 * gap, rows * (height + gap) - gap), "white")
    for person in range(num_people):
        for camid, left in zip(cameras, lefts, strict=True):
            picture = draw_image(
                seed,
                person + 1,
                camid=camid,
                scene=SYSU_SCENES[camid],
                modality=SYSU_CAMERAS[camid],
                number=1,
                size=(width, height),
            )
            sheet.paste(picture, (person // rows * column + left, person % rows * (height + gap)))
    sheet.save(path, format="JPEG", quality=80)
