"""The pages of the documentation as tests read them: links, anchors, snippets, commands, and names in the text.

A block of commands or Python is run by `tests/test_docs.py`, or has a comment above it that says what it needs
and a test does not have: `<!-- needs: GPU -->`. `NEEDS` has the words.
"""

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parent.parent
NEEDS = {"GPU", "cluster", "hub", "licensed data", "minutes"}
# What a line of commands may begin with, after variables of the environment.
PROGRAMS = ("python", "make", "pip", "source", "pre-commit", "cd", "git", "hf", "for", "done", "mkdocs", "docker")


def pages() -> list[Path]:
    """README and the like, and all pages of docs/ but the tables that ablations write."""
    written = ROOT / "docs/results"
    return [*sorted(ROOT.glob("*.md")), *sorted(p for p in (ROOT / "docs").rglob("*.md") if written not in p.parents)]


@dataclass(frozen=True)
class Block:
    """A block of code: its first line's number, its language ('' where none is said), its text and what it needs."""

    page: Path
    line: int
    language: str
    text: str
    needs: str | None = None

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"

    @property
    def is_python(self) -> bool:
        return self.language == "python" or (
            not self.language and re.match(r"(import|from) \w|\w+ = mpanet_jax\.", self.text) is not None
        )

    @property
    def is_commands(self) -> bool:
        if self.language:
            return self.language in ("bash", "sh", "console")
        return any(is_command(line) for line in self.text.splitlines())


def is_command(line: str) -> bool:
    """Whether a line calls one of the programs that the pages speak of."""
    words = [word for word in line.split() if not re.fullmatch(r"[A-Z_]+=\S*", word)]
    return len(words) > 1 and words[0] in PROGRAMS and line == line.lstrip()


def blocks(page: Path) -> list[Block]:
    """The fenced and the indented blocks of a page."""
    found, needs, lines = [], None, page.read_text().splitlines()
    number = 0
    while number < len(lines):
        line = lines[number]
        if mark := re.fullmatch(r"\s*<!-- needs: (.+) -->", line):
            needs = mark[1]
        elif fence := re.fullmatch(r"\s*```(\w*).*", line):
            end = next(n for n in range(number + 1, len(lines)) if lines[n].strip() == "```")
            found.append(Block(page, number + 2, fence[1], "\n".join(lines[number + 1 : end]), needs))
            number, needs = end, None
        elif line.startswith("    ") and (number == 0 or not lines[number - 1].strip()):
            end = number
            while end < len(lines) and (lines[end].startswith("    ") or not lines[end].strip()):
                end += 1
            text = "\n".join(part[4:] for part in lines[number:end]).rstrip()
            found.append(Block(page, number + 1, "", text, needs))
            number, needs = end - 1, None
        elif line.strip():
            needs = None
        number += 1
    return found


@dataclass(frozen=True)
class Command:
    """One call of a program: its variables of the environment, and its words."""

    words: tuple[str, ...]
    variables: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        return shlex.join(self.words)


def commands(text: str) -> list[Command]:
    """The commands of a block; of a loop's, those with the first value of its variable."""
    found: list[Command] = []
    loop: dict[str, str] = {}
    for line in text.replace("\\\n", " ").splitlines():
        for name, value in loop.items():
            line = line.replace(f"${name}", value)
        words = shlex.split(line, comments=True)
        if words[:1] == ["for"]:
            loop = {words[1]: words[3].rstrip(";")}
        elif words[:1] == ["done"]:
            loop = {}
        elif words:
            count = next((n for n, word in enumerate(words) if not re.fullmatch(r"[A-Z_]+=\S*", word)), len(words))
            found.append(Command(tuple(words[count:]), dict(word.split("=", 1) for word in words[:count])))
    return found


def _prose(page: Path) -> list[tuple[int, str]]:
    """The numbered lines outside the blocks of code."""
    lines = page.read_text().splitlines()
    inside = set()
    for block in blocks(page):
        inside |= set(range(block.line - (1 if block.language else 0), block.line + block.text.count("\n") + 2))
    return [(number, line) for number, line in enumerate(lines, 1) if number not in inside]


def spans(page: Path) -> Iterator[tuple[int, str]]:
    """(line, text) of every code span in the prose of a page; one that is broken over lines is in its first."""
    numbered = _prose(page)
    text = "\n".join(line for _, line in numbered)
    for match in re.finditer(r"(`+)(.+?)\1", text, re.S):
        yield numbered[text.count("\n", 0, match.start())][0], " ".join(match[2].split())


def links(page: Path) -> Iterator[tuple[int, str]]:
    """(line, target) of every link and picture of a page."""
    for number, line in _prose(page):
        for target in re.findall(r"\]\(([^()\s]+)\)", line):
            yield number, target


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings that both the site and GitHub make."""
    found = set()
    for _, line in _prose(page):
        if heading := re.match(r"#+ (.+)", line):
            words = re.sub(r"\[(.+?)\]\(.+?\)|[`*]", r"\1", heading[1]).strip().lower()
            github = re.sub(r"[^\w\- ]", "", words).replace(" ", "-")
            site = re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", words.encode("ascii", "ignore").decode()).strip())
            found |= {github} & {site}
    return found
