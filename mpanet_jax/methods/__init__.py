"""The methods by name: a new one is a file beside this one and a line here."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from mpanet_jax import datasets
from mpanet_jax.errors import SettingsError
from mpanet_jax.methods.agw import AGW, AGWSettings
from mpanet_jax.methods.caj import CAJ, CAJSettings
from mpanet_jax.methods.method import Method
from mpanet_jax.methods.mpanet import MPANet, MPANetSettings
from mpanet_jax.settings import Settings, expected_one_of, from_dict


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
    """The method that the settings are of.

    Raises:
      SettingsError: an unknown method, or settings of another class than the method's.
    """
    entry = _entry(settings.method)
    if not isinstance(settings, entry.settings):
        raise SettingsError(
            f"method = {settings.method!r}: its settings are {entry.settings.__name__}, and these "
            f"{type(settings).__name__}; mpanet_jax.Settings().replace({{'method': {settings.method!r}}}) makes them"
        )
    return entry.method(settings)


def settings_of(tree: Mapping[str, Any]) -> Settings:
    """The settings of a run from plain values, of a config file or of a run's config.json; of the class they are of.

    Raises:
      SettingsError: an unknown method, data set or field, or a value that cannot be.
    """
    cls = _entry(tree.get("method", Settings.method)).settings
    dataset = tree.get("dataset", {})
    if isinstance(dataset, Mapping):
        dataset = datasets.settings_of(dataset)
    return from_dict(cls, {**tree, "dataset": dataset})
