"""What all settings have in common: how fields are declared and checked, and how settings are compared and changed."""

import dataclasses
import difflib
import functools
import math
import sys
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from mpanet_jax.errors import SettingsError

# ---- fields ----


class Rule(NamedTuple):
    """What a value has to be.

    Attributes:
      expected: in words, which follow 'expected' in an error.
      holds: value → whether it is so.
    """

    expected: str
    holds: Callable[[Any], bool]


def setting(default: Any, comment: str, rule: Rule | Callable[[], Iterable[str]] | None = None) -> Any:
    """Declares a field of a settings dataclass.

    Args:
      default: its value.
      comment: its meaning.
      rule: what a value has to be: a `Rule`, or a function that returns the names that are allowed; None: its type is
        enough.
    """
    return dataclasses.field(default=default, metadata={"comment": comment, "rule": rule})


def group(cls: type, **defaults: Any) -> Any:
    """Declares a field that is a group of settings: a `cls()`, with other defaults where `defaults` names them."""
    return dataclasses.field(default_factory=functools.partial(cls, **defaults))


def at_least(least: float) -> Rule:
    """A finite number that is not below `least`."""
    return Rule(f"at least {least}", lambda value: least <= value < math.inf)


def between(least: float, most: float) -> Rule:
    """A number from `least` to `most`, both included."""
    return Rule(f"a number from {least} to {most}", lambda value: least <= value <= most)


def one_of(*names: str) -> Callable[[], Iterable[str]]:
    """The rule of a field that holds one of `names`."""
    return lambda: names


# ---- the check ----


def check(settings: Any, prefix: str = "") -> None:
    """Checks every field of a settings dataclass, and of its groups.

    A dataclass may have a method `check` that yields (field's path, fault) for what single fields cannot show.

    Args:
      settings: the dataclass.
      prefix: the path of the group that it is, with a dot at its end: 'data.'.

    Raises:
      SettingsError: names the first field that has a wrong type or breaks its rule.
    """
    for path, message in _faults(settings, prefix):
        raise SettingsError(f"{path} {message}")


def _faults(settings: Any, prefix: str) -> Iterator[tuple[str, str]]:
    """(path, '= VALUE: expected …') of every field that has a wrong type or breaks its rule."""
    hints = typing.get_type_hints(type(settings))
    for field in dataclasses.fields(settings):
        value, path, rule = getattr(settings, field.name), prefix + field.name, field.metadata.get("rule")
        if not _is_a(value, hints[field.name]):
            yield path, f"= {value!r}: expected {_type_name(hints[field.name])}"
        elif dataclasses.is_dataclass(value):
            yield from _faults(value, path + ".")
        elif isinstance(rule, Rule):
            if not rule.holds(value):
                yield path, f"= {value!r}: expected {rule.expected}"
        elif rule is not None and value not in (names := tuple(rule())):
            yield path, expected_one_of(value, names)
    for name, message in settings.check() if hasattr(settings, "check") else ():
        value = settings
        for part in name.split("."):
            value = getattr(value, part)
        yield prefix + name, f"= {value!r}: {message}"


def expected_one_of(value: Any, names: Iterable[str]) -> str:
    """The rest of an error message that begins with the name of a field: its value, and the names that it may be."""
    names = list(names)
    return f"= {value!r}: expected one of {', '.join(map(repr, names))}{_nearest(str(value), names)}"


def _nearest(name: str, names: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(names), 1)
    return f"; did you mean {close[0]!r}?" if close else ""


def _is_a(value: Any, hint: Any) -> bool:
    if typing.get_origin(hint) is tuple:
        inner = typing.get_args(hint)
        if not isinstance(value, tuple):
            return False
        if inner[-1] is Ellipsis:
            return all(_is_a(v, inner[0]) for v in value)
        return len(value) == len(inner) and all(map(_is_a, value, inner))
    if hint is float:
        if isinstance(value, float):
            return not math.isnan(value)
        return _is_a(value, int) and abs(value) <= sys.float_info.max  # Python's whole numbers have no end
    return isinstance(value, hint) and (hint is bool or not isinstance(value, bool))


def _type_name(hint: Any) -> str:
    names = {int: "a whole number", float: "a number", bool: "True or False", str: "a text"}
    if typing.get_origin(hint) is tuple:
        inner = typing.get_args(hint)
        numbers = "whole numbers" if inner[0] is int else "numbers"
        return f"a tuple of {numbers}" if inner[-1] is Ellipsis else f"{len(inner)} {numbers}"
    return names.get(hint, f"a {getattr(hint, '__name__', hint)}")


# ---- settings as dicts ----


def to_dict(settings: Any) -> dict[str, Any]:
    """A settings dataclass as nested dicts of plain values."""
    return dataclasses.asdict(settings)


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dicts as one dict of paths: {"data.height": 384, …}."""
    leaves = {}
    for name, value in tree.items():
        leaves |= flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {prefix + name: value}
    return leaves


def nested(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `flat`; raises `SettingsError` where one path is another's group."""
    tree: dict[str, Any] = {}
    for path, value in leaves.items():
        *groups, name = path.split(".")
        branch = tree
        for group_name in groups:
            branch = branch.setdefault(group_name, {})
            if not isinstance(branch, dict):
                raise _unknown_field(path, leaves)
        branch[name] = value
    return tree


def differences(settings: Any, other: Any) -> dict[str, tuple[Any, Any]]:
    """{"data.height": (384, 288), …}: the fields that differ, with both values; None where a field is missing."""
    ours, theirs = flat(to_dict(settings)), flat(to_dict(other))
    pairs = {name: (ours.get(name), theirs.get(name)) for name in ours | theirs}
    return {name: (one, two) for name, (one, two) in pairs.items() if one != two}


def from_dict(cls: type[Any], tree: Mapping[str, Any], prefix: str = "") -> Any:
    """Makes settings of class `cls` from nested dicts of plain values; fields that are not there get their defaults.

    Raises:
      SettingsError: the class has no such field, or the field refuses the value; the message begins with the path,
        which `prefix` begins.
    """
    fields = {field.name: field for field in dataclasses.fields(cls)}
    values = {}
    for name, value in tree.items():
        if name not in fields:
            raise _unknown_field(prefix + name, [prefix + field for field in fields])
        factory = fields[name].default_factory
        if isinstance(value, Mapping) and factory is not dataclasses.MISSING:
            default = factory()
            value = from_dict(type(default), {**to_dict(default), **value}, f"{prefix}{name}.")
        values[name] = tuple(value) if isinstance(value, list) else value
    return cls(**values)


def _unknown_field(path: str, known: Iterable[str]) -> SettingsError:
    """The error for a field that does not exist."""
    known = list(known)
    return SettingsError(f"{path}: unknown field; there are {', '.join(known)}{_nearest(path, known)}")


def replace(settings: Any, changes: Mapping[str, Any], prefix: str = "") -> Any:
    """A copy of the settings with some fields changed: `replace(settings, {"data.height": 288, "seed": 1})`.

    Unlike `Settings.replace` it keeps the classes: it changes no method and no data set.

    Raises:
      SettingsError: there is no such field, or it refuses the value.
    """
    by_field: dict[str, dict[str, Any]] = {}
    for path, value in changes.items():
        name, _, rest = path.partition(".")
        by_field.setdefault(name, {})[rest] = value
    values = {}
    for name, inner in by_field.items():
        if name not in (known := [field.name for field in dataclasses.fields(settings)]):
            raise _unknown_field(prefix + name, [prefix + field for field in known])
        value = inner.pop("", getattr(settings, name))
        if inner and not dataclasses.is_dataclass(value):
            raise _unknown_field(f"{prefix}{name}.{next(iter(inner))}", [prefix + field for field in known])
        values[name] = replace(value, inner, f"{prefix}{name}.") if inner else value
    return dataclasses.replace(settings, **values)
