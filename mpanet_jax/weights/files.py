"""Files of weights: `.safetensors` (without PyTorch) and PyTorch's `.pth`; nothing in a file is ever executed.

A *state dict* here is a dict of NumPy arrays by PyTorch's names.
"""

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy

from mpanet_jax.errors import UserError
from mpanet_jax.files import write_whole

StateDict = dict[str, np.ndarray]

TORCH_SUFFIXES = (".pth", ".pt", ".bin")
FILE_SUFFIXES = (".safetensors", *TORCH_SUFFIXES)
# The keys of the settings, and of the figures measured with them, in the metadata of a .safetensors file.
METADATA_KEY = "mpanet_jax.settings"
METRICS_KEY = "mpanet_jax.metrics"


def comma_list(names: Iterable[str], most: int = 20) -> str:
    """The first `most` names, separated by commas, and how many more there are."""
    names = list(names)
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:160]


def read_state_dict(path: str | Path) -> StateDict:
    """Reads the state dict in a `.safetensors` file, or in a `.pth`, `.pt` or `.bin` file (needs torch).

    Unwraps `{"state_dict": …}`, `{"model": …}` and the `module.` prefix of DataParallel. bfloat16 of PyTorch files
    becomes float32.

    Raises:
      UserError: the file does not exist, is damaged or of another kind, or has code in its pickle; or it is a PyTorch
        file and torch is not installed.
    """
    path = _existing(path)
    if path.suffix == ".safetensors":
        state_dict = _read_safetensors(path)
    elif path.suffix in TORCH_SUFFIXES:
        state_dict = _read_torch(path)
    else:
        raise UserError(f"{path}: unknown weights format; expected a name ending in {', '.join(FILE_SUFFIXES)}")
    if state_dict and all(name.startswith("module.") for name in state_dict):
        state_dict = {name.removeprefix("module."): array for name, array in state_dict.items()}
    return state_dict


def _existing(path: str | Path) -> Path:
    if not Path(path).is_file():
        raise UserError(f"{path}: no such weights file")
    return Path(path)


def _damaged(path: Path, kind: str, error: BaseException) -> UserError:
    return UserError(f"{path}: truncated, or not a {kind} file ({_one_line(error)}); get the file again")


def _read_safetensors(path: Path) -> StateDict:
    try:
        return safetensors.numpy.load_file(path)
    except (safetensors.SafetensorError, OSError, TypeError, KeyError) as error:
        raise _damaged(path, "safetensors", error) from error


def import_torch(path: Path) -> Any:
    """Imports PyTorch, which the file `path` needs.

    Raises:
      UserError: it is not installed.
    """
    try:
        import torch
    except ImportError as error:
        raise UserError(f"{path}: PyTorch files need torch: pip install torch, or use a .safetensors file") from error
    return torch


def _read_torch(path: Path) -> StateDict:
    torch = import_torch(path)
    try:
        # weights_only: the unpickler builds tensors and containers and refuses everything else.
        content = torch.load(path, weights_only=True, map_location="cpu")
    except Exception as error:  # torch raises many types for damaged files
        code = re.search(r"(?:GLOBAL|global)\s+`?([\w.]+)`?", str(error))
        if code:
            raise UserError(
                f"{path}: refused, its pickle holds code ({code[1]}) besides tensors; "
                "if you trust the file, save only its state dict: torch.save(model.state_dict(), …)"
            ) from error
        raise _damaged(path, "PyTorch", error) from error
    for key in ("state_dict", "model"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not isinstance(content, dict) or not content:
        raise UserError(f"{path}: expected a state dict (names and tensors), found {type(content).__name__}")
    foreign = [name for name, value in content.items() if not isinstance(value, torch.Tensor)]
    if foreign:
        raise UserError(
            f"{path}: expected a state dict, but these entries are not tensors: {comma_list(map(str, foreign))}"
        )
    return {
        name: (value.float() if value.dtype == torch.bfloat16 else value).detach().numpy()
        for name, value in content.items()
    }


def read_metadata(path: str | Path, key: str = METADATA_KEY) -> dict[str, Any] | None:
    """The settings, or what stands under another `key`, in the metadata of a `.safetensors` file.

    Returns:
      Plain values, or None if the file has no such key or is not a `.safetensors` file.

    Raises:
      UserError: the file does not exist or is damaged, or the value is not JSON.
    """
    path = _existing(path)
    if path.suffix != ".safetensors":
        return None
    try:
        with safetensors.safe_open(path, "numpy") as file:
            text = (file.metadata() or {}).get(key)
    except (safetensors.SafetensorError, OSError) as error:
        raise _damaged(path, "safetensors", error) from error
    try:
        return None if text is None else json.loads(text)
    except ValueError as error:
        raise UserError(f"{path}: its metadata are not a run's settings ({_one_line(error)})") from error


def write_state_dict(
    path: str | Path,
    state_dict: StateDict,
    settings: dict[str, Any] | None = None,
    metrics: Mapping[str, Any] | None = None,
) -> None:
    """Writes a `.safetensors` file, or a PyTorch file (`.pth`, `.pt` or `.bin`; needs torch), whole or not at all.

    Args:
      path: of the file; its ending decides the format.
      state_dict: the arrays.
      settings: plain values for the metadata of a `.safetensors` file; they define the network of the weights.
      metrics: figures measured with the weights, likewise for the metadata.

    Raises:
      UserError: the ending is unknown, or torch is needed and not installed.
    """
    path = Path(path)
    if path.suffix not in FILE_SUFFIXES:
        raise UserError(f"{path}: unknown weights format; expected a name ending in {', '.join(FILE_SUFFIXES)}")
    arrays = {name: np.asarray(array, order="C") for name, array in state_dict.items()}
    with write_whole(path, "wb") as file:
        if path.suffix == ".safetensors":
            known = {METADATA_KEY: settings, METRICS_KEY: metrics}
            metadata = {key: json.dumps(value) for key, value in known.items() if value is not None}
            file.write(safetensors.numpy.save(arrays, metadata={"format": "pt", **metadata}))
        else:
            torch = import_torch(path)
            torch.save({name: torch.from_numpy(array.copy()) for name, array in arrays.items()}, file)
