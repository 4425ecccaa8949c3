"""Training, killed and resumed, evaluated from its checkpoint; and what it says to bad input."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from threading import Event
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import config_flags  # noqa: F401 - the scripts' flags come from here

from configs import regdb as regdb_config
from configs import synthetic as synthetic_config
from configs import sysu as sysu_config
from mpanet_jax import experiment
from mpanet_jax.checkpoint import Checkpoints, load_model
from mpanet_jax.datasets.synthetic import write_dataset
from mpanet_jax.errors import UserError
from mpanet_jax.evaluation.workdir import evaluate_workdir
from mpanet_jax.train import _MetricReader, train
from tests.limits import HANGS_AFTER

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def raw(tmp_path_factory):
    folder = tmp_path_factory.mktemp("synthetic") / "raw"
    write_dataset("sysu_mm01", folder, num_train_ids=6, num_test_ids=4, images_per_camera=(3, 5), height=(48, 56))
    return folder


@pytest.fixture(scope="module")
def prepared(raw, tmp_path_factory):
    return tmp_path_factory.mktemp("prepared")


@pytest.fixture
def config(raw, prepared):
    config = synthetic_config.get_config()
    config.dataset.source, config.dataset.data_dir = str(raw), str(prepared)
    config.data.height, config.data.width = 32, 16
    config.data.num_ids_per_batch, config.data.images_per_id = 3, 4
    config.model.width = 16
    config.train.num_epochs = 1
    config.train.checkpoint_every_epochs = 1
    config.train.eval_every_epochs = 0
    config.eval.batch_size = 16
    return config


def final_state(workdir):
    step, model = load_model(workdir)
    return step, jax.tree.map(np.asarray, model)


def trees_equal(a, b):
    return all(jax.tree.leaves(jax.tree.map(np.array_equal, a, b)))


def test_train_writes_a_whole_workdir_and_evaluate_agrees(config, tmp_path):
    results = train(config, tmp_path / "run")
    written = json.loads((tmp_path / "run/metrics.json").read_text())
    assert set(written) == {"sysu/all/single", "sysu/all/multi", "sysu/indoor/single", "sysu/indoor/multi"}
    for setting in written.values():
        assert {"rank1", "rank5", "rank10", "rank20", "mAP", "mINP", "rerank"} <= set(setting)
        assert 0 < setting["mAP"] <= 100
    assert list((tmp_path / "run/logs").iterdir())
    restored = evaluate_workdir(tmp_path / "run")
    for name, values in results.items():
        for figure in ("rank1", "mAP", "mINP"):
            np.testing.assert_allclose(restored[name][figure], values[figure], rtol=1e-6)
    # Figures by other options are for --out only: the run's own record stays.
    report = tmp_path / "run/metrics.json"
    report.unlink()
    assert run_script("evaluate.py", f"--workdir={tmp_path}/run", "--rerank", cwd=tmp_path).returncode == 0
    assert not report.exists()
    assert run_script("evaluate.py", f"--workdir={tmp_path}/run", cwd=tmp_path).returncode == 0
    assert set(json.loads(report.read_text())) == set(written)
    moved = run_script("evaluate.py", f"--workdir={tmp_path}/run", f"--data_dir={tmp_path}", cwd=tmp_path)
    assert moved.returncode == 2 and f"not prepared in {tmp_path}; name the folder that was" in moved.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_resumed_training_is_bit_identical(config, tmp_path, monkeypatch):
    # Four steps in one go, against two, a stop, and two more from the checkpoint.
    config.train.num_epochs = 4
    monkeypatch.setattr("mpanet_jax.data.sampling.most_batches", lambda groups, p: 1)
    train(config, tmp_path / "whole")
    step, whole = final_state(tmp_path / "whole")
    assert step == 4

    save = Checkpoints.save

    def save_then_stop(self, step, state, batches):
        save(self, step, state, batches)
        if step == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(Checkpoints, "save", save_then_stop)
    with pytest.raises(KeyboardInterrupt):
        train(config, tmp_path / "halves")
    assert final_state(tmp_path / "halves")[0] == 2
    monkeypatch.setattr(Checkpoints, "save", save)
    train(config, tmp_path / "halves")
    step, halves = final_state(tmp_path / "halves")
    assert step == 4
    assert trees_equal(whole, halves)
    kept = sorted(int(p.name) for p in (tmp_path / "halves/checkpoints").iterdir() if p.name.isdigit())
    assert kept == [3, 4]


def test_best_checkpoint_is_the_one_with_the_greatest_figure(config, tmp_path, monkeypatch):
    # The evaluations after epochs 1, 2 and 3 are given; the second is best.
    config.train.num_epochs, config.train.eval_every_epochs, config.eval.best = 3, 1, "mAP"
    figures = iter([10.0, 30.0, 20.0])
    steps = []

    def evaluate(*_, **__):
        steps.append(None)
        return {"sysu/all/single": {"rank1": 0.0, "mAP": next(figures), "mINP": 0.0}}

    monkeypatch.setattr("mpanet_jax.train.evaluate_split", evaluate)
    last = train(config, tmp_path / "run")
    best = json.loads((tmp_path / "run/metrics_best.json").read_text())["sysu/all/single"]
    last_step, last_model = final_state(tmp_path / "run")
    best_step, best_model = load_model(tmp_path / "run", "best")
    assert (best["checkpoint"], best["mAP"], best["step"]) == ("best", 30.0, best_step)
    assert best_step == last_step * 2 // 3 and last["sysu/all/single"]["checkpoint"] == "last"
    assert not trees_equal(last_model, jax.tree.map(np.asarray, best_model))


@pytest.mark.parametrize("record", ["kept", "lost"])
def test_step_of_the_best_checkpoint_may_be_evaluated_again(config, tmp_path, monkeypatch, record):
    # The run is finished, so it is only evaluated: a little better than before, or after a kill before the record.
    config.eval.best = "mAP"
    figures = iter([10.0, 10.5])
    monkeypatch.setattr(
        "mpanet_jax.train.evaluate_split",
        lambda *_, **__: {"sysu/all/single": {"rank1": 0.0, "mAP": next(figures), "mINP": 0.0}},
    )
    train(config, tmp_path / "run")
    if record == "lost":
        (tmp_path / "run/metrics_best.json").unlink()
    train(config, tmp_path / "run")
    best = json.loads((tmp_path / "run/metrics_best.json").read_text())["sysu/all/single"]
    assert best["mAP"] == 10.5
    assert load_model(tmp_path / "run", "best")[0] == best["step"]


def test_evaluation_does_not_count_as_training_time(config, tmp_path, monkeypatch):
    # On a clock by which a step takes a second and an evaluation an hour.
    config.train.num_epochs, config.train.eval_every_epochs, config.train.log_every_steps = 3, 1, 1
    clock, rates = [0.0], []

    def step_done(_):
        clock[0] += 1
        return clock[0]

    def evaluate(*_, **__):
        clock[0] += 3600
        return {"sysu/all/single": {"rank1": 0.0, "mAP": 0.0, "mINP": 0.0}}

    monkeypatch.setattr("mpanet_jax.train.evaluate_split", evaluate)
    monkeypatch.setattr("mpanet_jax.train.time_when_ready", step_done)
    monkeypatch.setattr("mpanet_jax.train.time", SimpleNamespace(perf_counter=lambda: clock[0]))
    monkeypatch.setattr(
        "mpanet_jax.train.MetricLog.scalars",
        lambda self, step, values: rates.extend(v for name, v in values.items() if name.endswith("images_per_second")),
    )
    train(config, tmp_path / "run")
    assert len(rates) >= 3 and set(rates) == {12.0}  # P·K


def test_rates_are_by_when_steps_were_finished_not_by_when_they_were_read(monkeypatch):
    clock, looked_at = [0.0], Event()

    def perf_counter():
        looked_at.set()
        return clock[0]

    def time_passes(until):
        assert looked_at.wait(HANGS_AFTER)  # when the steps were finished: before anything is read
        looked_at.clear()
        clock[0] = until

    monkeypatch.setattr("mpanet_jax.train.time", SimpleNamespace(perf_counter=perf_counter))
    written = []
    log = SimpleNamespace(
        advance=lambda _: None, status=lambda _: None, scalars=lambda step, values: written.append(values)
    )
    finished = []
    reader = _MetricReader(log, 15, 30, 8, lambda step, when: finished.append((step, when)))
    metrics = {"loss": np.ones(15), "accuracy": np.ones(15)}
    reader.read_previous(0, 15, metrics)
    time_passes(until=3.0)  # the second call is sent off
    reader.read_previous(15, 30, metrics)
    time_passes(until=100.0)
    reader.finish()
    assert finished == [(15, 0.0), (30, 3.0)]
    assert written[1]["train/images_per_second"] == 15 * 8 / 3


def test_no_best_checkpoint_unless_asked(config, tmp_path):
    train(config, tmp_path / "run")
    with pytest.raises(UserError, match="checkpoints_best"):
        load_model(tmp_path / "run", "best")


def test_finished_run_is_evaluated_again_without_training(config, tmp_path):
    first = train(config, tmp_path / "run")
    before = final_state(tmp_path / "run")
    again = train(config, tmp_path / "run")
    assert trees_equal(before[1], final_state(tmp_path / "run")[1])
    assert first["sysu/all/single"]["mAP"] == again["sysu/all/single"]["mAP"]


def test_checkpoint_of_another_model_is_refused_and_config_kept(config, tmp_path, capfd):
    train(config, tmp_path / "run")
    before = (tmp_path / "run/config.json").read_text()
    capfd.readouterr()
    config.model.num_patterns = 3
    with pytest.raises(UserError, match=r"run: holds a run with another config, config.model.num_patterns = 3 \(6"):
        train(config, tmp_path / "run")
    assert (tmp_path / "run/config.json").read_text() == before
    (tmp_path / "run/config.json").unlink()  # lost: then the shapes tell
    with pytest.raises(UserError, match=r"checkpoints/\d+: .* \(\w+/.*: .*\d.* stored, .*\d.* in the config's model\)"):
        train(config, tmp_path / "run")
    assert "Traceback" not in capfd.readouterr().err
    assert not (tmp_path / "run/config.json").exists()


def test_run_goes_on_under_its_own_recipe_only(config, tmp_path):
    train(config, tmp_path / "run")
    config.train.num_epochs, config.data.cache, config.eval.rerank = 2, "none", True  # these it may change
    train(config, tmp_path / "run")
    config.loss.student_first, config.optim.milestones = True, (1,)
    with pytest.raises(UserError, match=r"config.loss.student_first = True \(False before\), config.optim.mile"):
        train(config, tmp_path / "run")


def test_diverged_run_stops_and_keeps_its_last_good_checkpoint(config, tmp_path, monkeypatch):
    config.train.num_epochs = 2
    monkeypatch.setattr("mpanet_jax.data.sampling.most_batches", lambda groups, p: 2)
    schedules = experiment.make_schedules

    def diverging(*arguments):
        learning_rate, mean_rate = schedules(*arguments)
        return lambda step: jnp.where(step < 2, learning_rate(step), jnp.nan), mean_rate

    monkeypatch.setattr("mpanet_jax.train.make_schedules", diverging)
    # Step 3 makes the weights NaN, step 4 is the first to see it, and the last before a checkpoint.
    with pytest.raises(UserError, match=r"step 4: the loss is nan; lower config.optim.learning_rate"):
        train(config, tmp_path / "run")
    assert final_state(tmp_path / "run")[0] == 2


def test_weights_alone_are_no_run_to_go_on_with(config, tmp_path):
    train(config, tmp_path / "run")
    for item in ("training", "data"):
        shutil.rmtree(next((tmp_path / "run/checkpoints").glob(f"[0-9]*/{item}")))
    config.train.num_epochs = 2
    with pytest.raises(UserError, match=r"checkpoints/\d+: lacks the data and training .*init_from"):
        train(config, tmp_path / "run")


@pytest.mark.parametrize("damage", ["cut off", "emptied", "gone"])
def test_damaged_checkpoint_is_named(config, tmp_path, damage):
    train(config, tmp_path / "run")
    (model,) = (tmp_path / "run/checkpoints").glob("[0-9]*/model")
    if damage == "gone":
        shutil.rmtree(model)
    files = [path for path in model.glob("**/d/*") if path.is_file()]
    for path in files:
        os.truncate(path, path.stat().st_size // 2 if damage == "cut off" else 0)
    assert files or damage == "gone"
    with pytest.raises(UserError, match=rf"{model.parent}: .*cannot be read .* delete it"):
        load_model(tmp_path / "run")
    config.train.num_epochs = 2
    said = "lacks the model that training" if damage == "gone" else "this checkpoint cannot be read"
    with pytest.raises(UserError, match=f"{model.parent}: {said}"):
        train(config, tmp_path / "run")


def test_official_preset_changes_what_method_lists():
    paper, official = sysu_config.get_config(), sysu_config.get_config("official")
    assert (paper.loss.modality_identity, official.loss.modality_identity) == (0.5, 1.0)
    assert (paper.loss.per_modality_identity, official.loss.per_modality_identity) == (True, False)
    assert (paper.loss.student_first, official.loss.student_first) == (False, True)
    assert (paper.augment.crop_padding, official.augment.crop_padding) == (0, 10)
    _, paper_rate = experiment.make_schedules(paper, 10)
    _, official_rate = experiment.make_schedules(official, 10)
    assert float(paper_rate(1395)) == pytest.approx(0.2)
    assert float(official_rate(1395)) == pytest.approx(0.2 * 100 / 141)
    assert paper.init_from == official.init_from == "hf:timm/resnet50.tv_in1k"
    regdb = regdb_config.get_config("split=3,official")
    assert (regdb.data.height, regdb.data.num_ids_per_batch, regdb.data.images_per_id) == (256, 12, 10)
    assert (tuple(regdb.optim.milestones), regdb.dataset.trial) == ((110,), 3)
    assert regdb_config.get_config("split=3").data.height == 384


@pytest.mark.parametrize(
    "section, field, value",
    [
        ("model", "stage_sizes", (1, 1)),
        ("augment", "erase_area", (0.5,)),
        ("augment", "crop_padding", -3),
        ("train", "num_epochs", 0),
        ("train", "eval_every_epochs", -1),
        ("model", "reduction", 7),
        ("eval", "best", "rank2"),
        ("optim", "learning_rate", float("nan")),
        ("optim", "decay", -1.0),
        ("optim", "milestones", (38, 29)),
        ("augment", "flip_probability", 1.5),
        ("augment", "crop_fill", 300),
        ("augment", "erase_area", (0.5, 0.2)),
        ("loss", "identity", -1.0),
        ("model", "stage_sizes", (1, 1, 1, 0)),
    ],
)
def test_values_that_make_no_run_are_refused(section, field, value):
    config = sysu_config.get_config()
    experiment.check_config(config)
    config[section][field] = value
    with pytest.raises(UserError, match=rf"^config\.{section}\.{field} = .*(expected|has to divide)"):
        experiment.check_config(config)


def run_script(name, *arguments, cwd):
    return subprocess.run(
        [sys.executable, str(ROOT / "scripts" / name), *arguments],
        capture_output=True,
        text=True,
        cwd=cwd,
        env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "JAX_PLATFORMS": "cpu", "HOME": str(cwd)},
    )


BAD_TRAINING = {
    "missing data root": (["--config.dataset.source=/does/not/exist"], "config.dataset.source"),
    "no data root at all": (["--config.dataset.source="], "prepare_data.py"),
    "unknown field": (["--config.optim.learnin_rate=1"], "learnin_rate"),
    "unknown preset": (["PRESET"], "unknown preset"),
    "P does not fit": (["--config.data.num_ids_per_batch=99"], "config.data.num_ids_per_batch"),
    "K is odd": (["--config.data.images_per_id=5"], "config.data.images_per_id"),
    "value of the wrong type": (["--config.data.height=tall"], "config.data.height"),
    "no such module": (["--config.model.channel_module=mamm"], "config.model.channel_module"),
    "preset by its field": (["--config.preset=official"], "--config=configs/NAME.py:official"),
    "no such trial": (["--config.dataset.name=regdb", "--config.dataset.trial=11"], "config.dataset.trial"),
    "not a flag": (["extra"], "extra: not a flag"),
    "one of several, alone": (["--num_processes=2"], "--num_processes goes with --distributed"),
    "weights that are not there": (["--config.init_from=/no/such/file.safetensors"], "/no/such/file.safetensors"),
}


@pytest.mark.parametrize("arguments, named", BAD_TRAINING.values(), ids=BAD_TRAINING.keys())
def test_bad_input_is_one_line_and_exit_code_2(arguments, named, raw, tmp_path):
    config_flag = f"--config={ROOT}/configs/synthetic.py"
    if arguments == ["PRESET"]:
        config_flag, arguments = config_flag + ":mistake", []
    result = run_script(
        "train.py",
        config_flag,
        f"--config.dataset.source={raw}",
        "--config.data.height=32",
        "--config.data.width=16",
        "--config.data.num_ids_per_batch=4",
        "--workdir=run",
        *arguments,
        cwd=tmp_path,
    )
    assert result.returncode == 2, result.stderr
    assert "Traceback" not in result.stderr
    message = result.stderr.strip().splitlines()[-1]
    assert message.startswith("error: ") and named in message, result.stderr
    assert not (tmp_path / "run").exists()


def test_config_file_that_is_not_there(tmp_path):
    result = run_script("train.py", "--config=configs/none.py", "--workdir=run", cwd=tmp_path)
    assert result.returncode == 2 and result.stderr.count("\n") == 1, result.stderr
    assert result.stderr.startswith("error: --config: No such file") and "configs/none.py" in result.stderr
    assert not list(tmp_path.iterdir())


def test_workdir_that_cannot_be_made(config, tmp_path):
    (tmp_path / "file").touch()
    result = run_script(
        "train.py",
        f"--config={ROOT}/configs/synthetic.py",
        f"--config.dataset.data_dir={config.dataset.data_dir}",
        f"--config.dataset.source={config.dataset.source}",
        "--config.data.height=32",
        "--config.data.width=16",
        "--config.data.num_ids_per_batch=3",
        f"--workdir={tmp_path}/file",
        cwd=tmp_path,
    )
    assert result.returncode == 2 and "Traceback" not in result.stderr, result.stderr
    assert result.stderr.strip().splitlines()[-1].startswith(f"error: {tmp_path}/file")
    assert "images: cache=" in result.stderr  # the choice and its sizes are printed


def test_missing_permutation_file_is_named(raw, tmp_path):
    shutil.copytree(raw, tmp_path / "raw")
    (tmp_path / "raw/exp/rand_perm_cam.mat").unlink()
    result = run_script(
        "train.py",
        f"--config={ROOT}/configs/synthetic.py",
        f"--config.dataset.source={tmp_path}/raw",
        "--workdir=run",
        cwd=tmp_path,
    )
    assert result.returncode == 2 and "rand_perm_cam.mat" in result.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("missing", ["folder", "checkpoint"])
def test_evaluate_without_a_checkpoint(missing, tmp_path, config):
    if missing == "checkpoint":
        experiment.save_config(config, tmp_path / "run")
    result = run_script("evaluate.py", "--workdir=run", cwd=tmp_path)
    assert result.returncode == 2 and "Traceback" not in result.stderr
    assert "run" in result.stderr.strip().splitlines()[-1]
    assert not (tmp_path / "run/metrics.json").exists()
