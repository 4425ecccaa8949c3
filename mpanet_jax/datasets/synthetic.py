"""Writes a synthetic data set of drawn people in a real data set's exact on-disk layout.

A plan says first which images and files there will be (`synthetic_layouts.py`); any number of processes then draw the
images (`synthetic_images.py`). An image depends on (seed, identity, camera, modality, number) only, so the same seed
gives byte-identical files for any number of workers.
"""

import multiprocessing
import os
import shutil
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image

from mpanet_jax.datasets.schema import INFRARED
from mpanet_jax.datasets.synthetic_images import draw_image
from mpanet_jax.datasets.synthetic_layouts import (
    SYSU_SCENES,
    DrawnImage,
    Plan,
    plan_llcm,
    plan_regdb,
    plan_sysu_mm01,
)
from mpanet_jax.datasets.sysu_mm01 import CAMERAS as SYSU_CAMERAS
from mpanet_jax.errors import UserError

# (layout, scale) → how many identities are for training (SYSU-MM01: train + val) and for the test, and three ranges or
# rates: images of an identity in a camera, image height in pixels (RegDB's images are all 64×128), and how often an
# identity misses a camera.
_SIZES = {
    ("sysu_mm01", "small"): dict(train=204, test=32, images=(1, 3), height=(120, 152), missing=0.12),
    ("sysu_mm01", "bench"): dict(train=395, test=96, images=(4, 10), height=(150, 200), missing=0.0),
    ("sysu_mm01", "full"): dict(train=395, test=96, images=(4, 30), height=(180, 400), missing=0.12),
    ("regdb", "small"): dict(train=63, test=63, images=(10, 10), height=(128, 128)),
    ("regdb", "full"): dict(train=206, test=206, images=(10, 10), height=(128, 128)),
    ("llcm", "small"): dict(train=76, test=28, images=(1, 3), height=(120, 152), missing=0.3),
    ("llcm", "full"): dict(train=713, test=351, images=(1, 6), height=(180, 400), missing=0.3),
}


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
    """Draws a data set of people into the new folder `out`, in the real data set's on-disk layout.

    Args:
      layout: 'sysu_mm01', 'regdb' or 'llcm'.
      out: the folder to make; it must not exist, or be empty. It appears only when it is complete.
      seed: the same seed gives byte-identical files, whatever `workers` is.
      scale: 'small' (about 2,500 images), 'full' (as many identities as the real data set, and images of similar
        sizes) or, for SYSU-MM01, 'bench' (its identities, all in every camera, with few and small images: 20,608 with
        seed 0).
      permutation: for SYSU-MM01 at scale 'full' only: the path of its rand_perm_cam.mat, with train_id.mat and
        test_id.mat beside it. The data set then has the identities and counts of these files (45,863 images), and a
        copy of the first one as exp/rand_perm_cam.mat.
      workers: how many processes draw; 0 draws in this one.
      num_train_ids, num_test_ids: numbers of identities (SYSU-MM01: train and val together); None: the scale's.
      images_per_camera: (fewest, most) images of an identity in a camera; None: the scale's.
      height: (lowest, highest) image height in pixels; None: the scale's. RegDB's is always 128.
      progress: called with (images drawn, images in all) after every few images.

    Returns:
      The number of images written.

    Raises:
      UserError: an unknown layout or scale, sizes out of range, an unreadable permutation, or an `out` that exists and
        is not an empty folder.
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
        plan = plan_sysu_mm01(rng, size, permutation)
    elif layout == "regdb":
        plan = plan_regdb(rng, size)
    else:
        plan = plan_llcm(rng, size)
    _write(plan, Path(out), seed, workers, progress)
    return len(plan.images)


# --- drawing and writing ---


def _write(plan: Plan, out: Path, seed: int, workers: int, progress: Callable[[int, int], None] | None) -> None:
    """Writes the plan's files and images into a new folder beside `out`, and renames that to `out` once it is whole."""
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


def _draw_all(chunks: list[list[DrawnImage]], root: Path, seed: int, workers: int):
    """Draws the chunks, in this process or in `workers` others; yields the number of images of each finished chunk."""
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


def _draw_chunk(root: Path, seed: int, images: list[DrawnImage]) -> int:
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
    """Writes a JPEG that shows the first `num_people` people of a seed, each in all six cameras of SYSU-MM01.

    A person is a row of images, `height` pixels high: the four visible cameras, then the two infrared ones. The people
    fill two columns.
    """
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
