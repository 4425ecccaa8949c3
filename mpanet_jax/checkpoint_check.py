"""Checks of a checkpoint on disk: its files are what was written, its numbers are finite, its arrays fit a model."""

import contextlib
import functools
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from absl import logging as absl_logging
from orbax.checkpoint import v1 as ocp

from mpanet_jax.checksums import find_damage
from mpanet_jax.errors import UserError, first_line


class DamagedCheckpoint(Exception):
    """A checkpoint that cannot be used; the message says why."""


@contextlib.contextmanager
def readable() -> Iterator[None]:
    """Turns what orbax and the libraries below it raise for broken or missing files into `DamagedCheckpoint`."""
    try:
        yield
    except (UserError, DamagedCheckpoint):
        raise
    except Exception as error:
        while error.__cause__ is not None:  # the innermost one says what is wrong
            error = error.__cause__
        raise DamagedCheckpoint(f"it cannot be read: {first_line(error)[:200]}") from error


def model_shapes(directory: Path) -> Any:
    """The shapes and types of the arrays in the item `model` of the checkpoint in `directory`, as a tree.

    Raises:
      ValueError: it has none.
    """
    stored = ocp.metadata(str(directory), checkpointable_name="model").metadata
    if not jax.tree.leaves(stored):
        raise ValueError("its list of arrays is empty")
    return stored


def shape_difference(stored: Any, wanted: Any) -> str | None:
    """A line about the first array that is missing in one of two trees or differs in shape; None if there is none."""

    def shapes(tree: Any) -> dict[str, tuple[int, ...]]:
        leaves = jax.tree_util.tree_leaves_with_path(tree)
        return {jax.tree_util.keystr(path, simple=True, separator="/"): tuple(leaf.shape) for path, leaf in leaves}

    stored, wanted = shapes(stored), shapes(wanted)
    for name in wanted | stored:
        if stored.get(name) != wanted.get(name):
            return f"{name}: {stored.get(name, 'nothing')} stored, {wanted.get(name, 'nothing')} in the config's model"
    return None


class _Unsaid(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        return record.levelno < logging.ERROR or "orbax" not in record.pathname


@functools.cache
def quiet_orbax() -> None:
    """Keeps orbax from logging errors: it does so with tracebacks, in every thread on the way, and raises them too."""
    absl_logging.get_absl_logger().addFilter(_Unsaid())


def is_finite(tree: Any) -> bool:
    """Whether all numbers in a tree of arrays are finite."""
    leaves = [leaf for leaf in jax.tree.leaves(tree) if jnp.issubdtype(leaf.dtype, jnp.inexact)]
    return all(jax.device_get(list(map(_all_finite, leaves))))


# One array at a time: a single program for all of them would take long to compile.
_all_finite = jax.jit(lambda leaf: jnp.isfinite(leaf).all())


def check_files(directory: Path) -> None:
    """Compares the files of the checkpoint in `directory` with their checksums.

    Raises:
      DamagedCheckpoint: they differ, or there are no files.
    """
    if not any(directory.iterdir()):
        raise DamagedCheckpoint("it is an empty folder")
    if fault := find_damage(directory):
        raise DamagedCheckpoint(fault)
