"""The code of the pages in docs/, as tests run it."""

from typing import Any

from tests.docs_pages import ROOT, blocks


def snippets(page: str) -> list[str]:
    """The Python blocks of a page."""
    return [block.text for block in blocks(ROOT / page) if block.is_python]


def run_code(page: str, *numbers: int) -> dict[str, Any]:
    """What Python blocks of a page, by their places on it, define; one after the other, in the current folder."""
    names: dict[str, Any] = {}
    for number in numbers:
        exec(compile(snippets(page)[number], f"{page}, block {number}", "exec"), names)
    return names
