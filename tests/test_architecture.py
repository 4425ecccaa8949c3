"""The structure that docs/architecture.md describes: what each part may import, and what stands where."""

import ast
import re
from pathlib import Path

PACKAGE = Path(__file__).parent.parent / "mpanet_jax"
SOURCES = ("mpanet_jax", "configs", "scripts", "benchmarks", "ablations", "tests", "docs")

# part: the internal modules or packages that it may import, beside itself; with `settings` also `settings_base`
ALLOWED = {
    "errors": {"lost_process"},
    "cpus": set(),
    "progress": set(),
    "compilation": set(),
    "background": set(),
    "call_plan": {"background"},
    "losses": {"modality"},
    "name_map": set(),
    "row_norms": set(),
    "optim": set(),
    "state": set(),
    "models": {"errors", "modality"},
    "modality": {"errors"},
    "files": {"errors"},
    "memory": set(),
    # The names of backbones and data sets, when settings are checked; and the settings of another method.
    "settings": {"settings_base", "models", "datasets", "methods"},
    "settings_base": {"errors"},
    "embeddings": {"errors", "files", "memory", "modality"},
    "protocol": {"embeddings", "errors", "modality"},
    "nonfinite": {"errors", "files"},
    "metric_log": {"nonfinite", "progress"},
    "lost_process": set(),
    "processes": {"errors", "lost_process", "progress"},
    "datasets": {"errors", "settings", "embeddings", "protocol", "modality", "files", "progress"},
    "data": {
        *("background", "datasets", "modality", "settings", "processes", "errors", "cpus", "memory", "files"),
        "progress",
    },
    "parallel": {"state", "errors", "processes"},
    "device_resize": {"data", "parallel", "settings"},
    "checksums": {"files"},
    "checkpoint": {"state", "checkpoint_check", "checksums", "processes", "errors"},
    "checkpoint_check": {"checksums", "errors"},
    "workdir_lock": {"processes", "errors"},
    "stop": {"processes", "errors"},
    "methods": {"datasets", "data", "models", "losses", "optim", "settings", "errors", "name_map", "modality"},
    "step": {"methods", "models", "state"},
    "run_files": {"methods", "settings", "errors", "files"},
    "run_setup": {
        *("checkpoint", "data", "datasets", "evaluation", "methods", "parallel", "processes", "settings", "state"),
        *("step", "weights"),
    },
    "weights": {"methods", "run_files", "checkpoint", "settings", "state", "errors", "files", "name_map"},
    "evaluation": {
        *("datasets", "data", "methods", "checkpoint", "run_files", "settings", "state", "errors", "cpus", "weights"),
        *("parallel", "processes", "embeddings", "protocol", "modality", "files", "progress", "row_norms"),
        *("background", "device_resize"),
    },
    "report": {
        *("model", "evaluation", "datasets", "data", "methods", "run_files", "settings", "errors", "cpus", "state"),
        *("embeddings", "protocol", "modality", "files", "progress", "log_pictures", "models", "row_norms"),
    },
    "log_pictures": {
        *("data", "datasets", "embeddings", "errors", "methods", "metric_log", "modality", "row_norms", "state"),
    },
    "export": {"model", "methods", "datasets", "settings", "modality", "errors", "files"},
    "model_card": {"datasets", "evaluation", "settings"},
    "model_folder": {"evaluation", "files", "model_card", "settings", "weights"},
    "model": {
        *("evaluation", "methods", "weights", "modality", "settings", "errors", "files", "model_folder", "row_norms"),
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
            allowed = ALLOWED[part] | {part} | ({"settings_base"} if "settings" in ALLOWED[part] else set())
            wrong += [
                f"{path.relative_to(PACKAGE)} imports {other}" for other in sorted(imported_parts(path) - allowed)
            ]
    assert not wrong, "\n".join(wrong)


def test_every_part_has_a_rule():
    parts = {path.stem if path.is_file() else path.name for path in PACKAGE.iterdir() if not path.name.startswith("_")}
    assert parts <= set(ALLOWED) | {"loop"}  # it may import everything


def test_the_conversion_of_names_knows_no_method():
    assert imported_parts(PACKAGE / "weights/names.py") <= {"errors", "name_map", "weights"}


def test_configs_are_read_by_scripts_only():
    # What a config file may refuse is translated in errors.py, at the scripts' edge.
    for path in PACKAGE.rglob("*.py"):
        assert "from ml_collections" not in path.read_text() or path.name == "errors.py"


def test_custom_gradients_and_barriers_are_in_the_fused_layers_only():
    for path in PACKAGE.rglob("*.py"):
        clever = re.findall(r"custom_vjp|custom_jvp|optimization_barrier|platform_dependent", path.read_text())
        assert not clever or (PACKAGE / "models/fused") in path.parents, path


def test_plain_layers_do_not_know_the_fused_ones():
    for path in (PACKAGE / "models").glob("*.py"):
        assert "models.fused" not in path.read_text(), path


def test_errors_speak_of_arguments_and_settings_not_of_flags():
    """But for whole commands, and options of other programs; scripts translate (errors.py)."""
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())) if path.name != "errors.py" else ():
            text = ast.unparse(node.exc) if isinstance(node, ast.Raise) and node.exc else ""
            flags = re.findall(r"(?<![\w-])(?:--[a-z]\w+|config\.(?!json)[a-z]\w+)", text)
            assert not flags or "scripts/" in text or "docker run" in text, f"{path}: {text}"


def test_only_methods_name_the_losses_and_modules_of_mpanet():
    names = set(re.findall(r"^def (\w+_loss)\(", (PACKAGE / "losses.py").read_text(), re.M))
    assert len(names) == 5
    names |= {"center_cluster", "mutual_mean", "modality_identity", "visible_classifier", "channel_module"}
    for path in PACKAGE.rglob("*.py"):
        own = {PACKAGE / "losses.py", *(PACKAGE / "methods").glob("*.py"), *(PACKAGE / "models").rglob("*.py")}
        assert path in own or not any(name in path.read_text() for name in names), path


def test_only_a_data_set_s_own_file_names_it():
    """But for the default of the settings, the drawn people in their layouts, and the examples of docstrings."""
    names = {f"'{name}'" for name in ("sysu_mm01", "regdb", "llcm", "own")}
    for path in PACKAGE.rglob("*.py"):
        if path.parent.name == "datasets" and path.stem in ("sysu_mm01", "regdb", "llcm", "own", "synthetic"):
            continue
        tree = ast.parse(path.read_text())
        texts = {repr(node.value) for node in ast.walk(tree) if isinstance(node, ast.Constant)}
        allowed = {"'sysu_mm01'"} if path.name == "settings.py" else set()
        assert not names & texts - allowed, path


def test_docstrings_cite_no_page_that_is_not_in_the_repository():
    root = PACKAGE.parent
    for path in [
        *root.glob("*.md"),
        *(p for f in SOURCES for p in (root / f).rglob("*") if p.suffix in (".py", ".md")),
    ]:
        text = "" if path == Path(__file__) else path.read_text()
        assert not re.search(r"\b(DESIGN|METHOD|REVIEW|PERFORMANCE)\b", text), path
        for page in re.findall(r"(?<!--out=)\bdocs/[\w/-]+\.\w+", text):  # what a command writes need not be there
            assert (root / page).exists(), f"{path}: {page}"
