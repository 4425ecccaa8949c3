"""Turns PyTorch's state dicts into the variables of a Flax network, and back.

Variables are nested dicts {"params", "batch_stats", "averages"}. A `NameMap` has the names; an array's layout (HWIO or
OIHW, [in, out] or [out, in]) follows from its number of axes.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from mpanet_jax.errors import UserError
from mpanet_jax.name_map import NameMap
from mpanet_jax.weights.files import StateDict, comma_list

Variables = dict[str, Any]

COUNTERS = r"(.*\.)?num_batches_tracked$"  # batch norm's, which are not used here


def _to_published(array: Any, is_linear: bool) -> Any:
    """HWIO → OIHW; [in, out] → [out, in], as a 1×1 convolution where the layer in PyTorch is one."""
    if array.ndim == 4:
        return array.transpose(3, 2, 0, 1)
    if array.ndim == 2:
        return array.T if is_linear else array.T[:, :, None, None]
    return array


def _from_published(array: np.ndarray, ndim: int) -> np.ndarray:
    if ndim == 4:
        return array.transpose(2, 3, 1, 0)
    if ndim == 2:
        return array.reshape(array.shape[:2]).T
    return array


def _entries(variables: Variables, names: NameMap) -> Iterator[tuple[tuple[str, ...], str, tuple[int, ...], Any]]:
    """(Flax path, PyTorch's name, PyTorch's shape, leaf) of every array."""
    flat: dict[tuple[str, ...], Any] = flatten_dict(variables)
    for path, leaf in flat.items():
        name = names.name(path)
        shape = _to_published(np.broadcast_to(np.float32(0), leaf.shape), names.is_classifier(name)).shape
        yield path, name, shape, leaf


def to_state_dict(variables: Variables, names: NameMap) -> StateDict:
    """Converts variables to a PyTorch state dict; the exact inverse of `from_state_dict`.

    A bare backbone gets the names that it has in ImageNet's weights. `num_batches_tracked` is not written, because
    PyTorch's `load_state_dict` does not require it.
    """
    variables = {name: variables[name] for name in ("params", "batch_stats", "averages") if name in variables}
    bare = all(names.is_backbone(path) for path in flatten_dict(variables))
    names = NameMap(names.backbone_rules, linear=names.linear) if bare else names
    state_dict = {
        name: np.ascontiguousarray(_to_published(np.asarray(leaf), names.is_classifier(name)))
        for _, name, _, leaf in _entries(variables, names)
    }
    for name in names.zeros:
        state_dict[name] = np.zeros_like(state_dict[name.rpartition(".")[0] + ".weight"])
    return state_dict


def from_state_dict(
    state_dict: StateDict,
    template: Variables,
    names: NameMap,
    *,
    drop_classifiers: bool = False,
    source: str | Path = "state dict",
    advice: str = "",
) -> tuple[Variables, list[str]]:
    """Converts a PyTorch state dict to variables.

    Args:
      state_dict: of the whole network, or of its backbone alone.
      template: {"params", "batch_stats", "averages"} of the network, arrays or shapes; the result has their types.
      names: the network's name map.
      drop_classifiers: leave out the classifiers and their averages, whatever their size.
      source: name of the state dict in errors.
      advice: ends the error message if the state dict does not fit.

    Returns:
      The variables as NumPy arrays, only the backbone's for a bare backbone; and the names that were left out.

    Raises:
      UserError: entries are missing, extra or misshapen, or hold NaN or infinity; the message names the first ones.
    """
    zeros = {name for name in names.zeros if name in state_dict and not state_dict[name].any()}
    left_out = {name for name in state_dict if re.fullmatch(f"{COUNTERS}|{names.left_out}", name)}
    if drop_classifiers:
        left_out |= {name for name in state_dict if names.is_classifier(name)}
    usable = {name: array for name, array in state_dict.items() if name not in left_out | zeros}

    names, expected = _expected(usable, template, names)
    if drop_classifiers:
        expected = {name: entry for name, entry in expected.items() if not names.is_classifier(name)}
    misfit = [
        f"{name} is {array.dtype}{list(array.shape)}, expected {list(expected[name].shape)}"
        for name, array in usable.items()
        if name in expected and (array.shape != expected[name].shape or not jnp.issubdtype(array.dtype, jnp.floating))
    ]
    missing, extra = sorted(expected.keys() - usable.keys()), sorted(usable.keys() - expected.keys())
    if missing or extra or misfit:
        kinds = {"missing": missing, "not part of the model": extra, "of another shape or type": sorted(misfit)}
        reason = _reason(state_dict, expected, missing + extra + misfit, names)
        most = 5 if reason else 20  # the cause says more than names
        raise UserError(
            f"{source}: does not fit the model{reason}; "
            + "; ".join(f"{kind}: {comma_list(those, most)}" for kind, those in kinds.items() if those)
            + (f"; {advice}" if advice else "")
        )
    broken = [name for name in sorted(expected) if not np.isfinite(usable[name]).all()]
    if broken:
        raise UserError(
            f"{source}: NaN or infinity in {comma_list(broken)}; take weights from before training diverged"
        )
    flat = {}
    for name, (paths, _, leaf) in expected.items():
        array = _from_published(usable[name], len(leaf.shape))
        flat |= {path: np.array(array, leaf.dtype, order="C") for path in paths}
    return unflatten_dict(flat), sorted(left_out)


class _Entry(NamedTuple):
    """An array that a state dict should have: the paths it goes to, its shape in PyTorch, and the leaf in the tree."""

    paths: list[tuple[str, ...]]
    shape: tuple[int, ...]
    leaf: Any


def _by_name(template: Variables, names: NameMap) -> dict[str, _Entry]:
    found: dict[str, _Entry] = {}
    for path, name, shape, leaf in _entries(template, names):
        found.setdefault(name, _Entry([], shape, leaf)).paths.append(path)
    return found


def _expected(found: Iterable[str], template: Variables, names: NameMap) -> tuple[NameMap, dict[str, _Entry]]:
    """The name map and the entries expected of a state dict with the names `found`.

    They are those of the backbone if some names are the backbone's and none belongs to another part of the network,
    otherwise those of the whole network.
    """
    whole = _by_name(template, names)
    bare = replace(names, rules=names.backbone_rules)
    parts = {path: leaf for path, leaf in flatten_dict(template).items() if names.is_backbone(path)}
    backbone = _by_name(unflatten_dict(parts), bare)
    found = set(found)
    others = {name for name, entry in whole.items() if not names.is_backbone(entry.paths[0])}
    return (bare, backbone) if found & backbone.keys() and not found & others else (names, whole)


def _reason(state_dict: StateDict, expected: Iterable[str], problems: Sequence[str], names: NameMap) -> str:
    """The likely cause of a misfit, to be inserted into the message; '' if it is not known."""
    found, wanted = names.describe(state_dict), names.describe(expected)
    if found != wanted:
        return f": another backbone, {found}; expected {wanted}" if found else f": no backbone like {wanted} in it"
    if all(names.is_classifier(problem.split(" ")[0]) for problem in problems):
        return ": its classifiers are missing or of other identities (drop_classifiers leaves them out)"
    return ""
