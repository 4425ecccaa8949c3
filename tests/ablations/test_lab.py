"""The lab: what is left to run, what is kept of it, and the tables; one row is trained for real, by the script."""

import fcntl
import json
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ablations import report
from ablations.lab import COMPILING, Options, Results, Run, Work, run_work, train_row, work_left
from ablations.tables import TABLES, Row, Table
from configs import synthetic_gpu
from mpanet_jax.datasets.synthetic import write_dataset
from mpanet_jax.errors import UserError
from mpanet_jax.methods import make_method, settings_of
from mpanet_jax.methods.agw import AGWSettings
from mpanet_jax.methods.mpanet import MPANetSettings
from mpanet_jax.settings_base import replace
from tests import scripts_in_process
from tests.ablations.rows import outcome, row_process

ROOT = Path(__file__).parents[2]
PLAIN = MPANetSettings()
OTHER = replace(PLAIN, {"model.channel_module": "se"})


def seeded(settings, seed):
    return replace(settings, {"seed": seed})


@pytest.fixture
def results(tmp_path):
    return Results(tmp_path / "out/ablations.json")


def options(tmp_path, seconds=600.0):
    return Options(tmp_path / "runs", time.time() + seconds, "")


def test_rows_run_fail_and_die_and_the_others_stand(results, tmp_path):
    names = {"good": "mam", "bad": "se", "dead": "in"}
    rows = {row: replace(PLAIN, {"model.channel_module": module}) for row, module in names.items()}
    said = []
    left = work_left(rows, range(2), results)
    assert left == [Work(row, (seeded(s, 0), seeded(s, 1))) for row, s in rows.items()]
    run_work(left, results, options(tmp_path), jobs=3, report=said.append, target=row_process)
    assert len(said) == 5
    again = Results.load(results.path)
    assert again.runs == results.runs
    assert set(again.finished(rows["good"])) == {0, 1} and not again.errors(rows["good"])
    assert set(again.finished(rows["bad"])) == {0} and again.errors(rows["bad"]) == {1: "the loss is nan"}
    assert "exit code 3" in again.errors(rows["dead"])[0] and "dead.log" in again.errors(rows["dead"])[0]
    # What failed is tried again, and only that.
    assert [(work.row, [s.seed for s in work.runs]) for work in work_left(rows, range(2), again)] == [
        ("bad", [1]),
        ("dead", [0, 1]),
    ]


def test_rows_are_compiled_one_after_the_other(tmp_path, monkeypatch):
    seen = []

    def is_free():
        with open(tmp_path / COMPILING, "w") as file:  # as another row's process opens it
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return False
            return True

    def train(settings, workdir, *, programs, on_steps):
        before = is_free()
        for _ in range(2):
            on_steps(1, 0.0)
            seen.append((settings.seed, before, is_free()))
        return {"sysu/all/single": {"step": 1}}

    monkeypatch.setattr("mpanet_jax.loop.train", train)
    work = Work("baseline", (seeded(PLAIN, 0), seeded(PLAIN, 1)))
    assert len(list(train_row(work, Options(tmp_path, time.time() + 600, "")))) == 2
    # From the first steps on another row may start; a row's later runs compile nothing.
    assert seen == [(0, False, True), (0, False, True), (1, True, True), (1, True, True)]


def test_after_the_deadline_no_run_starts(results, tmp_path):
    run_work(
        work_left({"row": PLAIN}, range(2), results),
        results,
        options(tmp_path, seconds=-1),
        jobs=1,
        report=pytest.fail,
        target=row_process,
    )
    assert results.runs == [] and not results.path.exists()


def test_a_run_counts_for_every_row_of_its_settings(results):
    results.add(Run("mpanet", PLAIN, outcome(1.0)))
    same = replace(PLAIN, {"train.log_every_steps": 7, "dataset.data_dir": "elsewhere"})
    left = work_left({"official": same, "se": OTHER, "se_again": OTHER}, range(2), results)
    assert [(work.row, [s.seed for s in work.runs]) for work in left] == [("official", [1]), ("se", [0, 1])]


def test_a_row_of_other_settings_is_refused(results):
    results.add(Run("mpanet", PLAIN, outcome(1.0)))
    with pytest.raises(
        UserError, match=r"ablations\.json: row 'mpanet' .* model\.channel_module = 'se' \('mam' there\)"
    ):
        work_left({"mpanet": OTHER}, [0], results)
    with pytest.raises(UserError, match=r"train\.num_epochs"):
        work_left({"mpanet": replace(PLAIN, {"train.num_epochs": 3})}, [0], results)


@pytest.mark.parametrize("text", ["{", "[]", '{"runs": [{"row": "a", "settings": {}}]}', '{"runs": [{"row": "a"}]}'])
def test_a_file_of_something_else_is_refused(text, tmp_path):
    (tmp_path / "ablations.json").write_text(text)
    with pytest.raises(UserError, match=r"ablations\.json: not the results of ablations"):
        Results.load(tmp_path / "ablations.json")


TABLE = Table("A table", (Row("mpanet", "MPANet", published=(70.0, 60.0)), Row("se", "SE"), Row("in", "IN")))
RECIPES = {"mpanet": PLAIN, "se": OTHER, "in": replace(PLAIN, {"model.channel_module": "in"})}


def filled(results):
    for seed, ours, others in ((0, 50.0, 44.0), (1, 54.0, 46.0)):
        results.add(Run("mpanet", seeded(PLAIN, seed), outcome(ours)))
        results.add(Run("se", seeded(OTHER, seed), outcome(others)))
    results.add(Run("se", seeded(OTHER, 2), {"error": "the loss is nan"}))
    return results


def test_a_difference_of_one_common_seed_has_no_deviation(results):
    for seed, value in ((0, 40.0), (5, 90.0)):
        results.add(Run("in", seeded(RECIPES["in"], seed), outcome(value)))
    text = report.markdown(TABLE, RECIPES, filled(results))
    assert "| 65.0 ± 25.0 | -10.0 | 63.0–68.0 |" in text


def test_markdown_has_means_deviations_and_what_failed(results):
    text = report.markdown(TABLE, RECIPES, filled(results))
    cells = {line.split(" | ")[0].strip("| "): line for line in text.splitlines() if line.startswith("|")}
    assert cells["MPANet"] == (
        "| MPANet | 70.00 / 60.00 | 52.0 ± 2.0 | 52.0 ± 2.0 | 52.0 ± 2.0 |  | 50.0–55.0 | 50.0–55.0 | 1,280 | 0, 1 |"
    )
    # The differences are −6 and −8.
    assert cells["SE"] == (
        "| SE |  | 45.0 ± 1.0 | 45.0 ± 1.0 | 45.0 ± 1.0 | -7.0 ± 1.0 | 43.0–48.0 | 43.0–48.0 | 1,280 "
        "| 0, 1 (1 failed) |"
    )
    assert cells["IN"].endswith("| not run |")
    assert len({line.count("|") for line in cells.values()}) == 1
    assert "SE, seed 2: the loss is nan" in text
    assert "sysu/all/single, 384×128" in text


def test_picture_is_written(results, tmp_path):
    pytest.importorskip("matplotlib", reason="of mpanet_jax[report]; the package and its JSON do without")
    report.draw(TABLE, RECIPES, filled(results), tmp_path / "table.png")
    assert (tmp_path / "table.png").read_bytes().startswith(b"\x89PNG")


def test_picture_without_matplotlib_is_an_error_that_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UserError, match="pip install matplotlib"):
        report.load_pyplot()


@pytest.mark.parametrize("name", TABLES)
def test_rows_of_a_table_are_recipes_and_differ(name):
    base = settings_of(synthetic_gpu.get_config("official").to_dict())
    presets = {row.preset for row in TABLES[name].rows} - {None}
    bases = {None: base} | {p: settings_of(synthetic_gpu.get_config(p).to_dict()) for p in presets}
    recipes = [replace(bases[row.preset], row.changes) for row in TABLES[name].rows]
    assert len(set(recipes)) == len(recipes)
    names = [row.name for row in TABLES[name].rows]
    assert len(set(names)) == len(names)


def test_rows_of_one_seed_share_the_start_of_their_common_layers():
    small = {"model.stage_sizes": (1, 1, 1, 1), "model.width": 8}
    baseline = replace(PLAIN, {**small, **TABLES["3"].rows[0].changes})
    images, modality, starts = jnp.zeros((2, 32, 32, 3)), jnp.arange(2), []
    for settings in baseline, replace(PLAIN, small), replace(AGWSettings(), small):
        network = make_method(settings).network(5)
        init = jax.jit(lambda key, n=network: n.init(key, images, modality, train=False)["params"]["stage4"])
        starts.append(jax.tree.leaves(init(jax.random.key(0))))
    for leaves in zip(*starts, strict=True):
        for other in leaves[1:]:
            np.testing.assert_array_equal(leaves[0], other)


def ablate(tmp_path, *arguments, alone=False):
    """`alone`: in a process of its own, not in the tests'."""
    arguments = [f"--config={ROOT}/configs/synthetic.py", "--table=3", "--nopng", *arguments]
    arguments += [f"--out={tmp_path}/out", f"--workdir={tmp_path}/runs"]
    if alone:
        command = [sys.executable, ROOT / "scripts/ablate.py", *arguments]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    else:
        done = scripts_in_process.process("ablate.py", *arguments, cwd=tmp_path)
    return done.returncode, done.stdout, done.stderr


def test_script_runs_a_row_and_goes_on_from_its_json(tmp_path):
    write_dataset(
        "sysu_mm01", tmp_path / "raw", num_train_ids=6, num_test_ids=3, images_per_camera=(3, 4), height=(48, 56)
    )
    sizes = {"data.height": 32, "data.width": 16, "data.num_ids_per_batch": 3, "model.width": 8, "train.num_epochs": 1}
    fields = [f"--config.{name}={value}" for name, value in sizes.items()]
    fields += [f"--config.dataset.source={tmp_path}/raw", f"--config.dataset.data_dir={tmp_path}/data"]
    fields += ["--config.model.backbone=resnet18"]
    cache = f"--compilation_cache={tmp_path}/xla"
    code, out, _ = ablate(tmp_path, *fields, "--rows=baseline", "--seeds=2", cache, alone=True)
    assert code == 0
    runs = json.loads((tmp_path / "out/ablations.json").read_text())["runs"]
    assert [(run["row"], run["settings"]["seed"]) for run in runs] == [("baseline", 0), ("baseline", 1)]
    assert all(run["settings"]["model"]["channel_module"] == "none" and "metrics" in run for run in runs)
    assert all(run["images"] % 12 == 0 and run["images"] > 0 for run in runs)
    table = (tmp_path / "out/table_3.md").read_text()
    assert table in out and "| baseline | 54.50 / 51.84 | " in table and "| + CC | 57.56 / 56.59 |" in table

    # The JSON alone: without the data and the runs, nothing is done, and the table is the same.
    (tmp_path / "raw").rename(tmp_path / "gone")
    (tmp_path / "runs").rename(tmp_path / "runs_gone")
    (tmp_path / "data").rename(tmp_path / "data_gone")
    assert ablate(tmp_path, *fields, "--rows=baseline", "--seeds=2")[0] == 0
    assert (tmp_path / "out/table_3.md").read_text() == table
    # Rows of other presets of the same config file, with its flags: five of table 3, four of the augmentations (none is
    # the same as mpanet, for there is no erasing in this config).
    code, _, err = ablate(tmp_path, *fields, "--seeds=1", "--time_limit=0", "--table=augmentations")
    assert code == 0 and "9 runs are left" in err
    assert "| channel exchange |" in (tmp_path / "out/table_augmentations.md").read_text()
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--table=5"], "--table = '5'"),
        (["--rows=basline"], "did you mean 'baseline'"),
        (["--config.model.width=0"], "--config.model.width = 0"),
        (["stray"], "stray"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(arguments, named, tmp_path):
    code, _, err = ablate(tmp_path, *arguments)
    assert code == 2 and err.count("\n") == 1 and named in err
    assert not list(tmp_path.iterdir())
