"""The data sets by name. A new one is a file beside this one, and its class in the line of DATASETS."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from mpanet_jax.datasets.dataset import Dataset
from mpanet_jax.datasets.llcm import Llcm
from mpanet_jax.datasets.own import Own
from mpanet_jax.datasets.regdb import Regdb
from mpanet_jax.datasets.schema import ImageRecord
from mpanet_jax.datasets.sysu_mm01 import SysuMm01
from mpanet_jax.errors import ArgumentError, SettingsError
from mpanet_jax.protocol import Protocol
from mpanet_jax.settings import DatasetSettings
from mpanet_jax.settings_base import check, expected_one_of, from_dict

DATASETS: dict[str, type[Dataset]] = {cls.name: cls for cls in (SysuMm01, Regdb, Llcm, Own)}
PROTOCOLS: dict[str, type[Protocol]] = {cls.name: cls for dataset in DATASETS.values() for cls in dataset.protocols}


def make_dataset(settings: DatasetSettings) -> Dataset:
    """The data set that the settings describe.

    Raises:
      SettingsError: a field has a value that it cannot have.
    """
    check(settings, "dataset.")
    return DATASETS[settings.name](settings)


def settings_of(tree: Mapping[str, Any]) -> DatasetSettings:
    """Makes the settings of a data set, of its own class, from a dict of plain values.

    Args:
      tree: {field: value}; 'name' says which data set. Fields that only other data sets have may be there, if they have
        their defaults.

    Raises:
      SettingsError: an unknown data set or field, or a value that the field cannot have.
    """
    name = tree.get("name", DatasetSettings.name)
    if name not in DATASETS:
        raise SettingsError(f"dataset.name {expected_one_of(name, DATASETS)}")
    chosen = DATASETS[name].settings_class
    known = {field.name for field in dataclasses.fields(chosen)}
    foreign = {field: owner for field, owner in own_fields().items() if field not in known}
    for field, owner in foreign.items():
        if field in tree and tree[field] != getattr(owner.settings_class, field):
            raise SettingsError(f"dataset.{field} = {tree[field]!r}: a field of {owner.name!r}, not of {name!r}")
    return from_dict(chosen, {field: value for field, value in tree.items() if field not in foreign}, "dataset.")


def own_fields() -> dict[str, type[Dataset]]:
    """{field: data set} for the fields of settings that a single data set has."""
    common = {field.name for field in dataclasses.fields(DatasetSettings)}
    return {
        field.name: dataset
        for dataset in DATASETS.values()
        for field in dataclasses.fields(dataset.settings_class)
        if field.name not in common
    }


def make_protocol(name: str, **arguments: Any) -> Protocol:
    """Makes the protocol called `name`.

    Args:
      name: a key of PROTOCOLS.
      **arguments: the fields of its class, such as SYSU-MM01's `permutation`; None counts as not given.

    Raises:
      ArgumentError: an unknown name, a missing argument, or one that the protocol does not have.
    """
    if name not in PROTOCOLS:
        raise ArgumentError("protocol", expected_one_of(name, PROTOCOLS))
    cls = PROTOCOLS[name]
    needed = [field.name for field in dataclasses.fields(cls)]  # pyright: ignore[reportArgumentType]
    given = {argument: value for argument, value in arguments.items() if value is not None}
    for argument in needed:
        if argument not in given:
            others = ", ".join(other for other in PROTOCOLS if argument not in _fields(other))
            raise ArgumentError(argument, f"missing; protocol {name!r} needs it (these don't: {others})")
    for argument in given:
        if argument not in needed:
            raise ArgumentError(argument, f"= {given[argument]!s}: protocol {name!r} reads none; leave it out")
    return cls(**given)


def _fields(name: str) -> list[str]:
    return [field.name for field in dataclasses.fields(PROTOCOLS[name])]  # pyright: ignore[reportArgumentType]


def record_of_path(path: str) -> ImageRecord | None:
    """What an image's path says in the layouts of all data sets; None if it fits none.

    If several fit, the one with the longest part of the path counts: LLCM's test_vis/cam3/… also ends in SYSU-MM01's
    cam3/….
    """
    matches = [dataset.record_of_path(path) for dataset in DATASETS.values()]
    return max((match for match in matches if match), key=lambda record: len(record.path), default=None)
