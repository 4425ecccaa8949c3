"""Which images and files a synthetic data set consists of, in the layout of SYSU-MM01, RegDB or LLCM."""

import io
import os
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import scipy.io
from scipy.io.matlab import MatReadError

from mpanet_jax.datasets.llcm import CAMERAS as LLCM_CAMERAS
from mpanet_jax.datasets.schema import INFRARED, VISIBLE
from mpanet_jax.datasets.sysu_mm01 import CAMERAS as SYSU_CAMERAS
from mpanet_jax.datasets.sysu_mm01 import load_permutation
from mpanet_jax.errors import UserError
from mpanet_jax.protocol import NUM_TRIALS

SYSU_SCENES = {1: 1, 2: 2, 3: 2, 4: 4, 5: 5, 6: 6}  # camera → the place it looks at; cameras 2 and 3 share a room


@dataclass(frozen=True)
class DrawnImage:
    """One image to draw.

    Attributes:
      path: below the data set's folder.
      pid, camid, modality: who is in it, and which camera takes it.
      scene: the place that the camera looks at; two cameras may share one.
      number: which of the person's images in this camera, from 1.
      width, height: in pixels.
    """

    path: str
    pid: int
    camid: int
    scene: int
    modality: int
    number: int
    width: int
    height: int


@dataclass
class Plan:
    """What a data set consists of: images to draw, and small files to write, {path: content}."""

    images: list[DrawnImage] = field(default_factory=list)
    files: dict[str, bytes] = field(default_factory=dict)


def plan_sysu_mm01(rng: np.random.Generator, size: dict, permutation: str | os.PathLike | None) -> Plan:
    """SYSU-MM01: cam{1..6}/{id:04d}/{n:04d}.jpg, four id lists of one line, and the protocol's permutation file.

    Args:
      rng: draws the rest.
      size: a value of `synthetic._SIZES`.
      permutation: the real rand_perm_cam.mat, whose identities and counts are taken; None: they are drawn.

    Raises:
      UserError: `permutation` cannot be read.
    """
    plan = Plan()
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
            plan.images.append(DrawnImage(path, pid, camid, SYSU_SCENES[camid], SYSU_CAMERAS[camid], n, width, height))
    return plan


def plan_regdb(rng: np.random.Generator, size: dict) -> Plan:
    """RegDB: {Visible,Thermal}/{id}/*.bmp of 64×128, and the ten splits idx/{train,test}_{visible,thermal}_{1..10}.txt.

    The arguments are those of `plan_sysu_mm01`.
    """
    plan = Plan()
    ids = list(range(1, size["train"] + size["test"] + 1))
    paths: dict[tuple[str, int], list[str]] = {}
    for camid, (folder, modality) in enumerate([("Visible", VISIBLE), ("Thermal", INFRARED)], start=1):
        for pid in ids:
            for n in range(1, int(rng.integers(size["images"][0], size["images"][1] + 1)) + 1):
                path = f"{folder}/{pid}/drawn_{folder[0].lower()}_{n:05d}_{pid}.bmp"
                paths.setdefault((folder, pid), []).append(path)
                plan.images.append(DrawnImage(path, pid, camid, 1 + n % 5, modality, n, 64, 128))
    for trial in range(1, NUM_TRIALS + 1):
        train, test = np.split(rng.permutation(ids), [size["train"]])
        for split, members in {"train": train, "test": test}.items():
            for folder in ("Visible", "Thermal"):
                lines = [
                    f"{path} {label}\n" for label, pid in enumerate(sorted(members)) for path in paths[folder, pid]
                ]
                plan.files[f"idx/{split}_{folder.lower()}_{trial}.txt"] = "".join(lines).encode()
    return plan


def plan_llcm(rng: np.random.Generator, size: dict) -> Plan:
    """LLCM: {vis,nir}/{id:04d}/* with idx/train_{vis,nir}.txt; test_{vis,nir}/cam{c}/{id:04d}/* with idx/test_id.txt.

    The arguments are those of `plan_sysu_mm01`.
    """
    plan = Plan()
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
            plan.images.append(DrawnImage(path, pid, camid, camid, modality, n, width, height))
    plan.files["idx/train_vis.txt"] = "".join(lines[VISIBLE]).encode()
    plan.files["idx/train_nir.txt"] = "".join(lines[INFRARED]).encode()
    plan.files["idx/test_id.txt"] = (",".join(map(str, test)) + "\n").encode()
    return plan


# ---- what the layouts draw at random ----


def _draw_ids(rng: np.random.Generator, count: int) -> list[int]:
    """`count` identities with gaps in their numbers, as the real lists have."""
    return sorted((rng.permutation(count + count // 10)[:count] + 1).tolist())


def _draw_counts(
    rng: np.random.Generator, ids: list[int], cameras: dict, images: tuple[int, int], missing: float
) -> dict:
    """{(camera, identity): how many images}: a random number from the range `images`, none at the rate `missing`.

    `cameras` maps a camera's key to its modality. Everybody is seen by at least one infrared and two visible cameras,
    so every query has a match in another room.
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
    """(width, height) of an image in pixels; the aspect ratio varies, as in the boxes of a person detector."""
    rows = int(rng.integers(height[0], height[1] + 1))
    return round(rows * rng.uniform(0.36, 0.44)), rows


def _permutation_file(rng: np.random.Generator, counts: dict, num_cells: int) -> bytes:
    """rand_perm_cam.mat as bytes: a 6×1 cell of N×1 cells of uint8 10×n, each row a permutation of 1…n."""
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
    # The first 116 bytes are free text. SciPy puts the time there; a fixed text makes the file reproducible.
    return b"MATLAB 5.0 MAT-file, drawn by mpanet_jax".ljust(116) + buffer.getvalue()[116:]


def _read_sysu_structure(permutation: Path) -> tuple[dict, list[int], list[int], list[int]]:
    """{(camera, identity): images} of the real rand_perm_cam.mat, and the train, val and test identities.

    The val list is the rest of the identities that have images of both modalities: no file beside rand_perm_cam.mat
    holds it. (22 identities have images of one modality only, which no list names.)
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
