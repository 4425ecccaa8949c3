"""Images as vectors, and the `.npz` files that hold them."""

import os
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float32, Int

from mpanet_jax.errors import UserError
from mpanet_jax.files import write_whole
from mpanet_jax.memory import free_ram
from mpanet_jax.modality import INFRARED, UNKNOWN, VISIBLE

REQUIRED = ("features", "pids", "camids", "paths")
OPTIONAL = ("modality", "pid_names")


@dataclass(frozen=True)
class Embeddings:
    """N images as vectors.

    Attributes:
      features: float32[N, D], finite.
      pids, camids: int[N], as the data set numbers them; a camid of -1 is unknown.
      paths: str[N]; only their order is read, where a protocol draws from the sorted files of an identity and camera.
      modality: int[N], 0 visible, 1 infrared, -1 unknown; None: all unknown.
      pid_names: str[N], what the data set calls the pids, where these are numbers of this program's making; else None.
      source: what error messages call these embeddings, usually the file they came from.
    """

    features: Float32[np.ndarray, "n d"]
    pids: Int[np.ndarray, " n"]
    camids: Int[np.ndarray, " n"]
    paths: np.ndarray
    modality: Int[np.ndarray, " n"] | None = None
    pid_names: np.ndarray | None = None
    source: str = "embeddings"

    def __len__(self) -> int:
        return len(self.pids)

    def take(self, rows: np.ndarray) -> "Embeddings":
        """The images `rows`, int[M] or bool[N]."""
        optional = {name: None if (column := getattr(self, name)) is None else column[rows] for name in OPTIONAL}
        required = (getattr(self, name)[rows] for name in REQUIRED)
        return Embeddings(*required, **optional, source=self.source)


def load_embeddings(path: str | os.PathLike) -> Embeddings:
    """Read an `.npz` of any framework: `features` float[N, D], `pids` int[N], `camids` int[N], `paths` str[N].

    `modality` int[N] and `pid_names` str[N] are read where they are in it.

    Raises:
      UserError: names the file: missing, not readable, without one of the arrays, or with one of another shape or type;
        NaN or infinite features.
    """
    path = Path(path)
    fix = "expected an .npz with features float[N,D], pids int[N], camids int[N] and paths str[N]"
    try:
        with np.load(path, allow_pickle=False) as archive:
            missing = [name for name in REQUIRED if name not in archive]
            if missing:
                raise UserError(f"{path}: no array named {', '.join(missing)}; {fix}")
            unpacked = sum(entry.file_size for entry in archive.zip.infolist())
            if unpacked > (free := free_ram()):
                raise UserError(f"{path}: unpacks to {unpacked >> 20} MiB of which {free >> 20} are free; split it")
            arrays = {}
            for name in (*REQUIRED, *(name for name in OPTIONAL if name in archive)):
                try:
                    arrays[name] = archive[name]
                except ValueError as error:
                    raise UserError(
                        f"{path}: {name} holds Python objects; save it as a plain array, np.asarray({name}, dtype=...)"
                    ) from error
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file; {fix}") from error
    except UserError:
        raise
    except Exception as error:  # whatever numpy and zipfile say about a broken file
        raise UserError(f"{path}: not a readable .npz ({error}); {fix}") from error
    for name, array in arrays.items():
        if array.dtype.kind == "S":
            try:
                arrays[name] = np.char.decode(array, "utf-8")
            except UnicodeDecodeError as error:
                raise UserError(f"{path}: {name} holds bytes that are not UTF-8; save it as text") from error
        elif array.dtype.kind == "U":
            try:
                array.tolist()  # characters beyond Unicode would fail wherever they are shown
            except (ValueError, SystemError) as error:
                raise UserError(f"{path}: {name} holds characters that there are not; save it as text") from error
    embeddings = check_embeddings(Embeddings(**arrays, source=str(path)))
    _warn_of_oddities(embeddings)
    return embeddings


def _warn_of_oddities(embeddings: Embeddings) -> None:
    """Says on stderr what makes a table worthless without being wrong by itself."""
    zero = np.flatnonzero(~embeddings.features.any(axis=1))
    if len(zero):
        what = f"{len(zero)} rows of features are all zero, first that of {embeddings.paths[zero[0]]}"
        print(f"warning: {embeddings.source}: {what}; they are as far from every image as from any", file=sys.stderr)
    _, first = np.unique(embeddings.paths, return_index=True)
    if len(first) < len(embeddings):
        again = np.setdiff1d(np.arange(len(embeddings)), first)
        what = f"{len(again)} paths come more than once, first {embeddings.paths[again[0]]}"
        print(f"warning: {embeddings.source}: {what}; each of them counts as an image of its own", file=sys.stderr)


def check_embeddings(embeddings: Embeddings) -> Embeddings:
    """The embeddings with float32 features, int64 ids and a modality, -1 where it is unknown.

    Raises:
      UserError: they break the contract.
    """
    source, features = embeddings.source, np.asarray(embeddings.features)
    if features.ndim != 2 or features.dtype.kind not in "fiu":
        raise UserError(f"{source}: features must be float[N,D], got {features.dtype}{list(features.shape)}")
    if not features.size:
        raise UserError(f"{source}: features is empty, {list(features.shape)}; expected at least one image")
    with np.errstate(over="ignore"):
        features = np.ascontiguousarray(features, np.float32)

    def column(name: str, kinds: str, what: str) -> np.ndarray:
        values = np.asarray(getattr(embeddings, name))
        if values.shape != (len(features),) or values.dtype.kind not in kinds:
            raise UserError(
                f"{source}: {name} must be {what}[{len(features)}], one for each row of features, "
                f"got {values.dtype}{list(values.shape)}"
            )
        return values

    pids, camids = (column(name, "iu", "int").astype(np.int64) for name in ("pids", "camids"))
    paths = column("paths", "UT", "str")
    if embeddings.modality is None:
        modality = np.full(len(features), UNKNOWN)
    else:
        modality = column("modality", "iu", "int").astype(np.int64)
    strange = ~np.isin(modality, (VISIBLE, INFRARED, UNKNOWN))
    if strange.any():
        row = int(strange.argmax())
        raise UserError(
            f"{source}: modality[{row}] ({paths[row]}) is {modality[row]}; "
            f"expected {VISIBLE} (visible), {INFRARED} (infrared) or {UNKNOWN} (unknown)"
        )
    pid_names = None if embeddings.pid_names is None else column("pid_names", "UT", "str")
    # A row's sum is not finite, or overflows, only where a value is not finite or is too large to square.
    with np.errstate(over="ignore", invalid="ignore"):
        norms = np.einsum("nd,nd->n", features, features)
    for row in np.flatnonzero(~np.isfinite(norms)):
        if not np.isfinite(features[row]).all():
            raise UserError(
                f"{source}: features[{row}] ({paths[row]}) holds NaN, an infinity or a value beyond float32; "
                "a model that diverged gives such features; expected finite ones"
            )
    return Embeddings(features, pids, camids, paths, modality, pid_names, source)


def save_embeddings(path: str | os.PathLike, embeddings: Embeddings) -> None:
    """Write `embeddings` as an uncompressed `.npz`; the file appears whole or not at all."""
    modality = embeddings.modality
    arrays = {
        "features": np.asarray(embeddings.features, np.float32),
        "pids": np.asarray(embeddings.pids),
        "camids": np.asarray(embeddings.camids),
        "paths": np.asarray(embeddings.paths, np.str_),
        "modality": np.full(len(embeddings), UNKNOWN) if modality is None else np.asarray(modality),
    }
    if embeddings.pid_names is not None:
        arrays["pid_names"] = np.asarray(embeddings.pid_names, np.str_)
    with write_whole(path, "wb") as file:
        np.savez(file, **arrays)  # pyright: ignore[reportArgumentType]: numpy's stub has no such keywords
