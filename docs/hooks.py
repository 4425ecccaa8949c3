"""Puts the tables of all settings into settings.md, from the dataclasses, when mkdocs builds the site."""

import dataclasses
from collections.abc import Iterator
from typing import Any

from mpanet_jax import datasets
from mpanet_jax.methods import METHODS
from mpanet_jax.settings import DatasetSettings, Settings
from mpanet_jax.settings_base import Rule

PLACE = "<!-- settings: docs/hooks.py puts the tables here, from the dataclasses of mpanet_jax -->"


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """A hook of mkdocs: gets and returns the Markdown of a page, before it becomes HTML."""
    if page.file.src_path != "settings.md":
        return markdown
    assert PLACE in markdown
    return markdown.replace(PLACE, tables())


def tables() -> str:
    """The tables of the common fields, and of each method's and each data set's own fields, as Markdown."""
    common = dict(fields_of(Settings()))
    parts = ["## All methods", *table(common)]
    for name, entry in METHODS.items():
        own = {path: row for path, row in fields_of(entry.settings()) if common.get(path) != row}
        parts += [f"\n## Method `{name}`: own fields and other defaults", *table(own)]
    shared = dict(fields_of(DatasetSettings(), "dataset."))
    for name, dataset in datasets.DATASETS.items():
        # From the class, because an object would need the folder of its images.
        fields = {f"dataset.{f.name}": row_of(f, f.default) for f in dataclasses.fields(dataset.settings_class)}
        if own := {path: row for path, row in fields.items() if path not in shared}:
            parts += [f"\n## Data set `{name}`: own fields", *table(own)]
    return "\n".join(parts)


def fields_of(settings: Any, prefix: str = "") -> Iterator[tuple[str, tuple[str, str, str]]]:
    """Yields (path, (default, meaning, allowed values)) of every field."""
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        if dataclasses.is_dataclass(value):
            yield from fields_of(value, f"{prefix}{field.name}.")
        else:
            yield prefix + field.name, row_of(field, value)


def row_of(field: Any, value: Any) -> tuple[str, str, str]:
    """Default, meaning and allowed values of a field, as Markdown."""
    rule = field.metadata["rule"]
    allowed = rule.expected if isinstance(rule, Rule) else ", ".join(f"`{name!r}`" for name in rule()) if rule else ""
    return f"`{value!r}`", field.metadata["comment"].replace("|", "\\|"), allowed


def table(rows: dict[str, tuple[str, str, str]]) -> list[str]:
    """The lines of a table in Markdown."""
    lines = ["", "| field | default | meaning | allowed |", "|---|---|---|---|"]
    return lines + [f"| `{path}` | {' | '.join(row)} |" for path, row in rows.items()]
