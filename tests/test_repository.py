"""The files around the program: what they name exists, and the versions agree."""

import os
import re
import shutil
import sys
import tomllib

import pytest
import yaml

from tests.docs_pages import ROOT

MAKEFILE = (ROOT / "Makefile").read_text()
TARGETS = set(re.findall(r"^([\w-]+):", MAKEFILE, re.M))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_the_workflow_runs_targets_of_the_makefile_only():
    workflow = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())
    ran = {}
    for name, job in workflow["jobs"].items():
        assert job["runs-on"].startswith("ubuntu")
        commands = [step["run"] for step in job["steps"] if "run" in step]
        assert commands, name
        for command in commands:
            program, target, *variables = re.sub(r"\$\{\{.*?\}\}", "x", command).split()
            assert program == "make" and target in TARGETS, command
            for variable in variables:
                assert re.search(rf"^{variable.partition('=')[0]} \?=", MAKEFILE, re.M), command
            ran[target] = name
    assert {"lint", "test", "docs", "wheel"} <= set(ran)
    matrix = workflow["jobs"]["test"]["strategy"]["matrix"]["include"]
    tested = {(run["python"], run["jax"]) for run in matrix}
    supported = set(re.findall(r"3\.\d+", PROJECT["requires-python"])) | {"3.12"}
    assert {python for python, _ in tested} == supported
    assert ("3.12", "jax==0.11.*") in tested and any(jax == "jax" for _, jax in tested)


def test_hooks_are_valid_and_call_the_tools_of_make_lint():
    clientlib = pytest.importorskip("pre_commit.clientlib")
    config = clientlib.load_config(ROOT / ".pre-commit-config.yaml")
    hooks = {hook["id"]: hook for repository in config["repos"] for hook in repository["hooks"]}
    assert {repository["repo"] for repository in config["repos"]} == {"local"}  # no network
    lint = MAKEFILE[MAKEFILE.index("\nlint:") :].split("\n\n")[0]
    for name, tool in (
        ("ruff", "ruff check"),
        ("ruff-format", "ruff format --check"),
        ("pyright", "pyright --project"),
    ):
        assert tool in hooks[name]["entry"] and f"/{tool}" in lint
        assert shutil.which(tool.split()[0], path=os.path.dirname(sys.executable))
    for name, fault in (("whitespace", b"a \nb\n"), ("whitespace", b"a\r\n"), ("end-of-file", b"a\n\n")):
        flags = re.M if name == "whitespace" else 0
        assert re.search(hooks[name]["entry"].encode(), fault, flags)
        assert not re.search(hooks[name]["entry"].encode(), b"a\n\nb\n", flags)


@pytest.mark.parametrize("template", ["bug", "method"])
def test_issue_templates_are_forms(template):
    form = yaml.safe_load((ROOT / f".github/ISSUE_TEMPLATE/{template}.yml").read_text())
    assert form["name"] and form["description"]
    names = [field["id"] for field in form["body"]]
    assert len(names) == len(set(names))
    for field in form["body"]:
        assert field["type"] in ("input", "textarea", "dropdown", "checkboxes", "markdown")
        assert field["attributes"]["label"]


def test_versions_agree():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    changelog = re.findall(r"^## \[(.+?)\]", (ROOT / "CHANGELOG.md").read_text(), re.M)
    assert citation["version"] == changelog[0] == PROJECT["version"]
    assert citation["license"] == PROJECT["license"]
    authors = [author["family-names"] for author in citation["references"][0]["authors"]]
    assert authors == ["Wu", "Dai", "Chen", "Lin", "Wu", "Huang", "Zhong", "Ji"]


def test_every_page_has_a_place_in_the_site():
    """`mkdocs build --strict` says so too; this needs no mkdocs."""
    config = (ROOT / "mkdocs.yml").read_text()
    placed = set(re.findall(r": ([\w/]+\.md)$", config, re.M))
    there = {str(path.relative_to(ROOT / "docs")) for path in (ROOT / "docs").glob("*.md")}
    assert placed == there
