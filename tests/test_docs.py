"""What the pages say can be done can be done: links lead somewhere, commands and snippets run, names exist."""

import importlib.util
import re
import runpy
import tomllib
from functools import cache
from pathlib import Path

import pytest

from mpanet_jax import datasets
from mpanet_jax.methods import METHODS
from mpanet_jax.settings_base import flat, to_dict
from tests.docs_pages import NEEDS, PROGRAMS, ROOT, Command, anchors, blocks, commands, links, pages, spans
from tests.docs_workplace import Workplace
from tests.scripts_in_process import Refused, flags_of, folder, run

# One worker makes the runs that the pages speak of, for all of them.
pytestmark = pytest.mark.xdist_group("docs")
PAGES = [str(page.relative_to(ROOT)) for page in pages()]
# Flags of other programs that the text names.
FOREIGN_FLAGS = {"shm-size", "signal", "requeue", "strict", "help", "logdir"}
# What runs them needs more than a folder with the files that they name.
RUN_ELSEWHERE = {
    "docs/architecture.md": "tests/test_architecture_page.py",
    "docs/python.md": "tests/test_python_page.py",
    "docs/visualize.md": "tests/report",
}


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    return Workplace(tmp_path_factory.mktemp("docs"))


@cache
def script_flags():
    return {path.name: flags_of(path.name) for path in (ROOT / "scripts").glob("*.py")}


@cache
def config_paths():
    """Every field of every method and data set, and every group, by its path."""
    trees = [to_dict(entry.settings()) for entry in METHODS.values()]
    fields = {path for tree in trees for path in flat(tree)} | {f"dataset.{name}" for name in datasets.own_fields()}
    return fields | {path.rpartition(".")[0] for path in fields}


@cache
def make_names():
    text = (ROOT / "Makefile").read_text()
    return set(re.findall(r"^([\w-]+):", text, re.M)), set(re.findall(r"^(\w+) [?:]?=", text, re.M))


def fault_of(command: Command) -> str | None:
    """Why a command cannot be right, whatever it would find on the disk."""
    program, *arguments = command.words
    if program == "python" and arguments[0] == "-m":
        module = arguments[1]
        spec = importlib.util.find_spec(module)
        if spec is None or spec.origin is None:
            return f"no module {module}"
        source = Path(spec.origin).read_text() if module.split(".")[0] in ("tests", "benchmarks") else None
        unknown = [flag for flag in re.findall(r"--[\w-]+", " ".join(arguments[2:])) if source and flag not in source]
        return f"{module} knows no {unknown}" if unknown else None
    if program == "python":
        if not (ROOT / arguments[0]).is_file():
            return f"no file {arguments[0]}"
        try:
            run(list(arguments), only_parse=True)
        except Refused as refused:
            return str(refused)
    if program == "make":
        targets, variables = make_names()
        for word in arguments:
            if word.partition("=")[0] not in (variables if "=" in word else targets):
                return f"the Makefile has no {word}"
    if program == "pip":
        extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
        for extra in re.findall(r"mpanet_jax\[(.+?)\]", " ".join(arguments)):
            if not set(extra.split(",")) <= set(extras):
                return f"no extra {extra}"
    return None if program in PROGRAMS else f"what is {program}?"


@pytest.mark.parametrize("name", PAGES)
def test_links_lead_somewhere(name):
    """Without a network: to files, and to headings by the anchor that both the site and GitHub give them."""
    page, wrong = ROOT / name, []
    for line, target in links(page):
        path, _, anchor = target.partition("#")
        if re.match(r"\w+:", target):
            wrong += [] if target.startswith(("https://", "mailto:")) else [f"{line}: {target}"]
            continue
        file = (page.parent / path).resolve() if path else page
        if not file.exists() or not file.is_relative_to(ROOT):
            wrong.append(f"{line}: no file {path}")
        elif page.parent == ROOT / "docs" and not file.is_relative_to(ROOT / "docs"):
            wrong.append(f"{line}: {path} is not in the site")
        elif anchor and anchor not in anchors(file):
            wrong.append(f"{line}: {file.name} has no heading #{anchor}")
    assert not wrong


@pytest.mark.parametrize("name", PAGES)
def test_commands_can_be_right(name):
    """Of marked blocks too: scripts and modules exist, and take these flags; config files have these fields."""
    with folder(ROOT):
        wrong = [
            f"{block}: {command}: {fault}"
            for block in blocks(ROOT / name)
            if block.is_commands
            for command in commands(block.text)
            if (fault := fault_of(command))
        ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("name", PAGES)
def test_names_in_the_text_exist(name):
    """Flags, config fields, files, make's targets."""
    wrong = []
    known_flags = set().union(*script_flags().values()) | FOREIGN_FLAGS
    known_flags |= {f"no{flag}" for flag in known_flags}
    for line, span in spans(ROOT / name):
        script = re.match(r"(?:python )?(?:scripts/)?(\w+\.py)\b", span)
        module = re.search(r"python -m ([\w.]+)", span)
        for flag in re.findall(r"(?<![\w-])--(\w[\w.-]*)", span):
            if flag.startswith("config."):
                found = flag.removeprefix("config.") in config_paths()
            elif module:
                found = f"--{flag}" in Path(importlib.util.find_spec(module[1]).origin).read_text()
            else:
                found = flag in script_flags().get(script[1] if script else "", known_flags) | FOREIGN_FLAGS
            wrong += [] if found else [f"{line}: --{flag} in `{span}`"]
        for path in re.findall(r"(?<![\w-])config\.([a-z_]+(?:\.\w+)*)", span):
            wrong += [] if path in config_paths() | {"json"} else [f"{line}: config.{path}"]
        for path in re.findall(r"^((?:data|augment|optim|train|eval|loss|mean|dataset)\.\w+)", span):
            is_field = not path.endswith((".py", ".safetensors"))
            wrong += [f"{line}: {path}"] if is_field and path not in config_paths() else []
        for path in re.findall(r"(?<![\w/.])(\w+(?:/\w+)*/\w+\.(?:py|md|jpg))\b", span):
            places = (ROOT, ROOT / "mpanet_jax")
            is_ours = any((place / path.split("/")[0]).is_dir() for place in places)
            wrong += [f"{line}: {path}"] if is_ours and not any((p / path).exists() for p in places) else []
        for target in re.findall(r"^make ([\w-]+)", span):
            wrong += [] if target in make_names()[0] else [f"{line}: make {target}"]
    assert not wrong, "\n".join(wrong)


def test_marks_are_of_the_known_kinds():
    marks = {block.needs for name in PAGES for block in blocks(ROOT / name)} - {None}
    assert marks <= NEEDS


def test_settings_page_has_every_field_with_its_default():
    tables = runpy.run_path(str(ROOT / "docs/hooks.py"))["tables"]()
    rows = dict(re.findall(r"^\| `([\w.]+)` \| `(.*?)` \|", tables.split("\n## Method `agw`")[0], re.M))
    assert {path: repr(value) for path, value in flat(to_dict(METHODS["mpanet"].settings())).items()} == rows
    assert set(re.findall(r"^\| `([\w.]+)`", tables, re.M)) == config_paths() - {
        p.rpartition(".")[0] for p in config_paths()
    }


def to_run(name):
    """The blocks of commands and Python without a mark."""
    found = [block for block in blocks(ROOT / name) if not block.needs and (block.is_python or block.is_commands)]
    return found if name not in RUN_ELSEWHERE else []


@pytest.mark.parametrize("name", list(filter(to_run, PAGES)))
def test_commands_and_snippets_run(name, workplace):
    """On drawn people where they name real data, with small networks and few epochs."""
    workplace.make_ready()
    for block in to_run(name):
        workplace.run_block(block)
