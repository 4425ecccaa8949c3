"""The methods by name. A new method is a file in this folder and a line in `METHODS`."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from mpanet_jax import datasets
from mpanet_jax.errors import SettingsError
from mpanet_jax.methods.agw import AGW, AGWSettings
from mpanet_jax.methods.caj import CAJ, CAJSettings
from mpanet_jax.methods.method import Method
from mpanet_jax.methods.mpanet import MPANet, MPANetSettings
from mpanet_jax.settings import Settings
from mpanet_jax.settings_base import expected_one_of, from_dict


class Entry(NamedTuple):
    """A method and the class of its settings."""

    method: type[Method]
    settings: type[Settings]


METHODS = {
    "mpanet": Entry(MPANet, MPANetSettings),
    "agw": Entry(AGW, AGWSettings),
    "caj": Entry(CAJ, CAJSettings),
}


def _entry(name: Any) -> Entry:
    if name not in METHODS:
        raise SettingsError(f"method {expected_one_of(name, METHODS)}")
    return METHODS[name]


def make_method(settings: Settings) -> Method:
    """Makes the method that `settings.method` names, with these settings.

    Raises:
      SettingsError: the method is unknown, or the settings are not of its class.
    """
    entry = _entry(settings.method)
    if not isinstance(settings, entry.settings):
        raise SettingsError(
            f"method = {settings.method!r}: expected {entry.settings.__name__}, found {type(settings).__name__}; "
            f"use mpanet_jax.Settings().replace({{'method': {settings.method!r}}})"
        )
    return entry.method(settings)


def settings_of(tree: Mapping[str, Any]) -> Settings:
    """Makes settings from plain values, in the classes of their method and data set.

    Args:
      tree: nested dicts, as from a config file or a run's config.json. What is missing takes its default.

    Raises:
      SettingsError: the method, the data set or a field is unknown, or a value is not allowed.
    """
    cls = _entry(tree.get("method", Settings.method)).settings
    dataset = tree.get("dataset", {})
    if isinstance(dataset, Mapping):
        dataset = datasets.settings_of(dataset)
    return from_dict(cls, {**tree, "dataset": dataset})
