"""Imports point down the list that DESIGN draws: what each part of the package may import of the others."""

import ast
from pathlib import Path

PACKAGE = Path(__file__).parent.parent / "mpanet_jax"

# part: the internal modules or packages that it may import, beside itself
ALLOWED = {
    "errors": set(),
    "cpus": set(),
    "losses": set(),
    "optim": set(),
    "models": set(),
    "metric_log": set(),
    "datasets": {"errors"},
    "data": {"datasets", "errors", "cpus"},
    "state": {"models"},
    "step": {"models", "losses", "optim", "state", "data"},
    "parallel": {"state", "errors"},
    "processes": {"errors"},
    "weights": {"errors", "models", "state", "checkpoint"},
    "checkpoint": {"state", "errors"},
    "experiment": {"datasets", "data", "losses", "models", "optim", "errors", "state", "weights"},
    "evaluation": {
        *("datasets", "data", "models", "step", "checkpoint", "experiment", "errors", "cpus", "weights"),
        *("parallel", "processes"),
    },
}


def imported_parts(path: Path) -> set[str]:
    parts = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("mpanet_jax"):
            names = [node.module] if node.module != "mpanet_jax" else [f"mpanet_jax.{a.name}" for a in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names if alias.name.startswith("mpanet_jax.")]
        else:
            continue
        parts |= {name.split(".")[1] for name in names}
    return parts


def test_imports_follow_the_flow():
    wrong = []
    for path in sorted(PACKAGE.rglob("*.py")):
        part = path.relative_to(PACKAGE).with_suffix("").parts[0]
        if part in ALLOWED:
            wrong += [
                f"{path.relative_to(PACKAGE)} imports {other}"
                for other in sorted(imported_parts(path) - ALLOWED[part] - {part})
            ]
    assert not wrong, "\n".join(wrong)


def test_every_part_has_a_rule():
    parts = {path.stem if path.is_file() else path.name for path in PACKAGE.iterdir() if not path.name.startswith("_")}
    free = {"train", "benchmarks"}  # may import everything
    assert parts <= set(ALLOWED) | free


def test_configs_are_read_only_where_design_says():
    readers = {"experiment.py", "train.py", "evaluation/workdir.py"}
    for path in PACKAGE.rglob("*.py"):
        name = str(path.relative_to(PACKAGE))
        if "ConfigDict" in path.read_text() and not name.startswith("benchmarks/"):
            assert name in readers
