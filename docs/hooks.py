"""Puts the tables of all settings into settings.md, from the dataclasses, when mkdocs builds the site."""

import dataclasses
from collections.abc import Iterator
from typing import Any

from mpanet_jax import datasets
from mpanet_jax.methods import METHODS
from mpanet_jax.settings import DatasetSettings, Rule, Settings

PLACE = "<!-- settings: docs/hooks.py puts the tables here, from the dataclasses of mpanet_jax -->"


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """mkdocs's hook: the text of a page before it becomes HTML."""
    if page.file.src_path != "settings.md":
        return markdown
    assert PLACE in markdown
    return markdown.replace(PLACE, tables())


def tables() -> str:
    """The common fields, then each method's and data set's own."""
    common = dict(fields_of(Settings()))
    parts = ["## Of every method", *table(common)]
    for name, entry in METHODS.items():
        own = {path: row for path, row in fields_of(entry.settings()) if common.get(path) != row}
        parts += [f"\n## Of the method `{name}`, or with another default", *table(own)]
    shared = dict(fields_of(DatasetSettings(), "dataset."))
    for name, dataset in datasets.DATASETS.items():
        # The class's own fields: a whole one would need the folder that it is of.
        fields = {f"dataset.{f.name}": row_of(f, f.default) for f in dataclasses.fields(dataset.settings_class)}
        if own := {path: row for path, row in fields.items() if path not in shared}:
            parts += [f"\n## Of the data set `{name}`", *table(own)]
    return "\n".join(parts)


def fields_of(settings: Any, prefix: str = "") -> Iterator[tuple[str, tuple[str, str, str]]]:
    """(path, (default, meaning, what is allowed)) of every field."""
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        if dataclasses.is_dataclass(value):
            yield from fields_of(value, f"{prefix}{field.name}.")
        else:
            yield prefix + field.name, row_of(field, value)


def row_of(field: Any, value: Any) -> tuple[str, str, str]:
    """Default, meaning and what is allowed."""
    rule = field.metadata["rule"]
    allowed = rule.expected if isinstance(rule, Rule) else ", ".join(f"`{name!r}`" for name in rule()) if rule else ""
    return f"`{value!r}`", field.metadata["comment"].replace("|", "\\|"), allowed


def table(rows: dict[str, tuple[str, str, str]]) -> list[str]:
    """Markdown's lines."""
    lines = ["", "| field | default | meaning | allowed |", "|---|---|---|---|"]
    return lines + [f"| `{path}` | {' | '.join(row)} |" for path, row in rows.items()]
