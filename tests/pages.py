"""The code of the pages in docs/, as tests run it."""

import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent


def run_code(page: str, *numbers: int) -> dict[str, Any]:
    """What Python blocks of a page, by their places on it, define; one after the other, in the current folder."""
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / page).read_text(), re.S | re.M)
    names: dict[str, Any] = {}
    for number in numbers:
        exec(compile(blocks[number], f"{page}, block {number}", "exec"), names)
    return names
