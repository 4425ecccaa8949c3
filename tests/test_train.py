"""Training, killed and resumed, evaluated from its checkpoint; and what it says to bad input."""

import json
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import config_flags  # noqa: F401 - the scripts' flags come from here

from configs import regdb as regdb_config
from configs import synthetic as synthetic_config
from configs import sysu as sysu_config
from mpanet_jax import checkpoint, datasets, run_setup
from mpanet_jax.checkpoint import Checkpoints, latest_step, load_model
from mpanet_jax.checkpoint_check import model_shapes
from mpanet_jax.checksums import CHECKSUMS_FILE
from mpanet_jax.data.cache import open_images
from mpanet_jax.data.decode import encoded_image
from mpanet_jax.datasets.regdb import RegdbSettings
from mpanet_jax.datasets.synthetic import write_dataset
from mpanet_jax.errors import SettingsError, Stopped, UserError
from mpanet_jax.evaluation.metrics_output import describe_measurement
from mpanet_jax.evaluation.workdir import evaluate_set, evaluate_workdir
from mpanet_jax.loop import train
from mpanet_jax.methods import METHODS, Entry, make_method, settings_of
from mpanet_jax.methods.mpanet import TERMS
from mpanet_jax.metric_log import MetricReader
from mpanet_jax.run_files import load_settings, save_settings
from mpanet_jax.run_setup import Programs
from mpanet_jax.settings import Settings
from mpanet_jax.settings_base import replace
from mpanet_jax.step import train_steps
from mpanet_jax.workdir_lock import locked_workdir
from tests import scripts_in_process
from tests.datasets.by_name import prepare
from tests.limits import HANGS_AFTER
from tests.methods_in_tests import LinenMethod
from tests.scripts_in_process import Refused, process
from tests.test_metric_log import read_events

ROOT = Path(__file__).parent.parent
# All in one worker: they share a run, and the programs of the small network.
pytestmark = pytest.mark.xdist_group("train")


@pytest.fixture(scope="module")
def raw(tmp_path_factory):
    folder = tmp_path_factory.mktemp("synthetic") / "raw"
    write_dataset("sysu_mm01", folder, num_train_ids=6, num_test_ids=4, images_per_camera=(3, 5), height=(48, 56))
    return folder


@pytest.fixture(scope="module")
def prepared(raw, tmp_path_factory):
    return tmp_path_factory.mktemp("prepared")


@pytest.fixture(scope="module")
def settings(raw, prepared):
    changes = {
        "dataset.source": str(raw),
        "dataset.data_dir": str(prepared),
        "data.height": 32,
        "data.width": 16,
        "data.num_ids_per_batch": 3,
        "data.images_per_id": 4,
        "model.backbone": "resnet18",
        "model.width": 8,
        "train.num_epochs": 1,
        "train.checkpoint_every_epochs": 1,
        "train.eval_every_epochs": 0,
        "eval.batch_size": 16,
    }
    return replace(settings_of(synthetic_config.get_config().to_dict()), changes)


@pytest.fixture(scope="module")
def trained(settings, tmp_path_factory):
    """(workdir of a finished run with `settings`, what `train` returned)."""
    workdir = tmp_path_factory.mktemp("trained") / "run"
    return workdir, train(settings, workdir)


@pytest.fixture
def finished_run(trained, tmp_path):
    """The workdir of a finished run with `settings`, tmp_path/run."""
    return shutil.copytree(trained[0], tmp_path / "run")


@pytest.fixture
def linen(settings, monkeypatch):
    """The same run of a method that the package does not know, whose network compiles in a moment."""
    monkeypatch.setitem(METHODS, "linen", Entry(LinenMethod, Settings))
    return settings.replace({"method": "linen"})


def final_state(workdir):
    step, model = load_model(workdir)
    return step, jax.tree.map(np.asarray, model)


def trees_equal(a, b):
    return all(jax.tree.leaves(jax.tree.map(np.array_equal, a, b)))


def test_train_writes_a_whole_workdir_and_evaluate_agrees(trained, finished_run, tmp_path):
    results = trained[1]
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
    assert process("evaluate.py", f"--workdir={tmp_path}/run", "--rerank").returncode == 0
    assert not report.exists()
    # In a process of its own, which knows nothing of the run but its files.
    assert start_script("evaluate.py", f"--workdir={tmp_path}/run", cwd=tmp_path).returncode == 0
    assert set(json.loads(report.read_text())) == set(written)
    moved = process("evaluate.py", f"--workdir={tmp_path}/run", f"--data_dir={tmp_path}")
    assert moved.returncode == 2 and f"not prepared in {tmp_path}; give the folder" in moved.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_second_run_in_a_workdir_is_refused_and_evaluation_is_not(settings, finished_run, tmp_path):
    # What TensorBoard shows of the evaluation at the end.
    (log,) = (tmp_path / "run/logs").iterdir()
    values = {value.tag: value for event in read_events(log) for value in event.summary.value}
    assert values["train/epoch"].simple_value == 1 and values["train/loss"].simple_value > 0  # fewer than 50 steps
    batch, maps = values["batch_after_augmentation"].image, values["pattern_maps"].image
    data = settings.data
    assert batch.width == data.images_per_id * (data.width + 2) - 2
    assert (maps.width, maps.height) == (7 * (data.width + 2) - 2, 8 * (data.height + 2) - 2)
    assert values["distance/one_identity"].histo.num > 0 and values["distance/two_identities"].histo.num > 0
    before = sorted(path for path in (tmp_path / "run").rglob("*"))
    with locked_workdir(tmp_path / "run"):
        with pytest.raises(UserError, match=f"{tmp_path}/run: .* trains there"):
            train(replace(settings, {"train.num_epochs": 2}), tmp_path / "run")
        assert 0 < evaluate_workdir(tmp_path / "run")["sysu/all/single"]["mAP"] <= 100
    assert sorted(path for path in (tmp_path / "run").rglob("*")) == before


def test_runs_of_several_seeds_are_averaged_by_the_script(linen, tmp_path):
    by_seed = []
    for seed in (1, 2):
        save_settings(replace(linen, {"seed": seed}), tmp_path / f"seed{seed}")
        by_seed.append(evaluate_workdir(tmp_path / f"seed{seed}", checkpoint="untrained"))
    out = tmp_path / "average.json"
    command = ["scripts/evaluate.py", f"--workdirs={tmp_path}/seed*", "--checkpoint=untrained", f"--out={out}"]
    scripts_in_process.run(command)
    for name, values in json.loads(out.read_text()).items():
        single = [metrics[name]["mAP"] for metrics in by_seed]
        assert single[0] != single[1]
        np.testing.assert_allclose([values["mAP"], values["std"]["mAP"]], [np.mean(single), np.std(single)], rtol=1e-6)
        assert (values["seeds"], values["trials"], "interval" in values) == ([1, 2], 10, False)
    save_settings(replace(linen, {"seed": 2}), tmp_path / "seed3")
    with pytest.raises(Refused, match="seed3: was trained with seed 2"):
        scripts_in_process.run(command)


def test_flip_is_named_in_the_output(linen, tmp_path):
    results = []
    for flip in (False, True):
        save_settings(replace(linen, {"eval.flip": flip}), tmp_path / f"{flip}")
        results.append(evaluate_workdir(tmp_path / f"{flip}", checkpoint="untrained"))
    plain, flipped = results
    assert not any("flip" in values or "flip" in describe_measurement(values) for values in plain.values())
    assert all(values["flip"] is True and "flip ON" in describe_measurement(values) for values in flipped.values())
    assert any(plain[name]["mAP"] != flipped[name]["mAP"] for name in plain)


# config.json as version 0.1 wrote it for `settings`; {source} and {data_dir} are filled in.
OLD_CONFIG = """{
  "augment": {"crop_fill": 127, "crop_padding": 6, "erase_area": [0.02, 0.33], "erase_aspect": [0.3, 3.3],
    "erase_probability": 0.0, "flip_probability": 0.5},
  "batch_scale": "global",
  "data": {"cache": "auto", "height": 32, "images_per_id": 4, "num_ids_per_batch": 3, "num_workers": -1, "width": 16},
  "dataset": {"data_dir": "{data_dir}", "name": "sysu_mm01", "source": "{source}", "trial": 1},
  "dtype": "auto",
  "eval": {"batch_size": 16, "best": "", "rerank": false},
  "init_from": "",
  "loss": {"center_cluster": 1.0, "identity": 1.0, "margin": 0.7, "modality_identity": 0.5, "mutual_mean": 2.5,
    "per_modality_identity": true, "separation": 0.5, "student_first": false},
  "mean": {"epochs_at_full": 0, "rate": 0.2},
  "model": {"channel_module": "mam", "num_patterns": 6, "pattern_module": "pam", "reduction": 16,
    "stage_sizes": [1, 1, 1, 1], "width": 8},
  "optim": {"decay": 0.1, "learning_rate": 0.004, "milestones": [29, 38], "weight_decay": 0.0005},
  "parallel": "pmap",
  "preset": "paper",
  "seed": 0,
  "train": {"checkpoint_every_epochs": 1, "eval_every_epochs": 0, "keep_checkpoints": 2, "log_every_steps": 50,
    "num_epochs": 4, "steps_per_call": 15}
}"""


@pytest.fixture(scope="module")
def four_steps(settings, tmp_path_factory):
    """(settings of four epochs of one step, what they end with in one go, their programs)."""
    # Version 0.1 had one backbone.
    settings, programs = replace(settings, {"train.num_epochs": 4, "model.backbone": "resnet50"}), Programs()
    workdir = tmp_path_factory.mktemp("whole") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mpanet_jax.data.sampling.most_batches", lambda groups, p: 1)
        train(settings, workdir, programs=programs)
    step, whole = final_state(workdir)
    assert step == 4
    return settings, whole, programs


@pytest.mark.parametrize("version", ["this", "0.1"])
def test_resumed_training_is_bit_identical(four_steps, tmp_path, monkeypatch, version):
    # Four steps in one go, against two, a stop, and two more from the checkpoint. A run of version 0.1 has the averages
    # as `mean_classifiers` in its checkpoint, and no method and no backbone in its config.json.
    settings, whole, programs = four_steps
    monkeypatch.setattr("mpanet_jax.data.sampling.most_batches", lambda groups, p: 1)
    save, items = Checkpoints.save, checkpoint._items

    def save_then_stop(self, step, state, batches):
        save(self, step, state, batches)
        if step == 2:
            raise KeyboardInterrupt

    def old_items(state):
        model = items(state)["model"]
        return items(state) | {"model": {"mean_classifiers" if n == "averages" else n: v for n, v in model.items()}}

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "save", save_then_stop)
        if version == "0.1":
            patch.setattr(checkpoint, "_items", old_items)
        with pytest.raises(KeyboardInterrupt):
            train(settings, tmp_path / "halves", programs=programs)
    stored = set(model_shapes(tmp_path / "halves/checkpoints/2"))
    assert stored == {"params", "batch_stats", "mean_classifiers" if version == "0.1" else "averages"}
    if version == "0.1":
        config = OLD_CONFIG.replace("{source}", settings.dataset.source)
        config = config.replace("{data_dir}", settings.dataset.data_dir)
        (tmp_path / "halves/config.json").write_text(config)
        assert load_settings(tmp_path / "halves") == settings
        assert 0 < evaluate_workdir(tmp_path / "halves")["sysu/all/single"]["mAP"] <= 100
    step, half = final_state(tmp_path / "halves")
    assert step == 2 and half.keys() == {"params", "batch_stats", "averages"}
    train(settings, tmp_path / "halves", programs=programs)
    step, halves = final_state(tmp_path / "halves")
    assert step == 4
    assert trees_equal(whole, halves)
    kept = sorted(int(p.name) for p in (tmp_path / "halves/checkpoints").iterdir() if p.name.isdigit())
    assert kept == [3, 4]


def test_batches_with_images_are_sent_several_a_call(linen, tmp_path, monkeypatch):
    # That the steps are the same then is tested on several devices (tests/parallel_process.py).
    monkeypatch.setattr("mpanet_jax.data.sampling.most_batches", lambda groups, p: 7)
    monkeypatch.setattr("mpanet_jax.call_plan.SENT_STEPS", 3)
    settings = linen.replace({"data.cache": "host"})
    for backend, steps in (("gpu", [3, 6, 7]), ("cpu", [1, 2, 3, 4, 5, 6, 7])):
        done = []
        with monkeypatch.context() as patch:
            patch.setattr("mpanet_jax.call_plan.jax", SimpleNamespace(default_backend=lambda backend=backend: backend))
            train(settings, tmp_path / backend, on_steps=lambda step, _, done=done: done.append(step))
        assert done == steps


@pytest.mark.parametrize(
    "data",
    [{"cache": "device"}, {"cache": "host"}, *({"cache": "none", "resize_on": who} for who in ("host", "device"))],
    ids=["device", "host", "none", "none, resized by the device"],
)
def test_the_step_is_traced_once_and_compiled_once_beside_the_rest(linen, tmp_path, monkeypatch, data):
    monkeypatch.setattr("mpanet_jax.data.sampling.most_batches", lambda groups, p: 2)
    traced_in, compiled_in = [], []

    def traced_steps(*arguments, **options):
        traced_in.append(threading.current_thread())
        return train_steps(*arguments, **options)

    def on_duration(event, _, fun_name=None, **__):
        if event == "/jax/core/compile/backend_compile_duration" and fun_name == "jit(traced_steps)":
            compiled_in.append(threading.current_thread())

    def without_the_device(function):
        def call(*arguments):
            with jax.transfer_guard("disallow"):  # a GPU answers only after it has got the run's images
                return function(*arguments)

        return call

    for function in (run_setup.state_shapes, run_setup.lower_steps):
        monkeypatch.setattr(f"mpanet_jax.loop.{function.__name__}", without_the_device(function))
    monkeypatch.setattr("mpanet_jax.run_setup.train_steps", traced_steps)
    jax.monitoring.register_event_duration_secs_listener(on_duration)
    try:
        train(linen.replace({f"data.{name}": value for name, value in data.items()}), tmp_path / "run")
    finally:
        jax.monitoring.unregister_event_duration_listener(on_duration)
    assert len(traced_in) == len(compiled_in) == 1
    assert traced_in[0] is threading.current_thread() is not compiled_in[0]


def test_a_run_that_fails_at_its_start_leaves_no_process(linen, tmp_path, monkeypatch):
    def wrong(*_):
        raise RuntimeError("no weights")

    monkeypatch.setattr("mpanet_jax.loop.initial_state", wrong)
    before = set(multiprocessing.active_children())
    with pytest.raises(RuntimeError, match="no weights") as raised:
        train(linen.replace({"data.cache": "none", "data.num_workers": 2}), tmp_path / "run")
    assert raised and set(multiprocessing.active_children()) <= before  # while the exception holds the run


def test_an_error_in_the_step_is_raised_as_it_is(linen, tmp_path, monkeypatch):
    def wrong(*arguments, **options):
        raise ValueError("a loss of mine")

    monkeypatch.setattr("mpanet_jax.run_setup.train_steps", wrong)
    with pytest.raises(ValueError, match="a loss of mine"):
        train(linen, tmp_path / "run")


def test_a_run_is_the_same_whoever_resizes(linen, tmp_path, monkeypatch):
    monkeypatch.setattr("mpanet_jax.data.sampling.most_batches", lambda groups, p: 2)
    runs = {}
    for who in ("host", "device"):
        settings = linen.replace({"data.cache": "none", "data.resize_on": who})
        runs[who] = train(settings, tmp_path / who), final_state(tmp_path / who)
    assert runs["host"][0] == runs["device"][0]
    assert trees_equal(runs["host"][1], runs["device"][1])


@pytest.mark.parametrize("when", ["between steps", "during an evaluation"])
def test_run_that_is_asked_to_stop_loses_nothing(linen, tmp_path, monkeypatch, when):
    # One step an epoch, an evaluation after the second, no checkpoint but at the end.
    changes = {"train.num_epochs": 4, "train.checkpoint_every_epochs": 0, "train.eval_every_epochs": 2}
    linen = replace(linen, {**changes, "eval.best": "mAP"})
    monkeypatch.setattr("mpanet_jax.data.sampling.most_batches", lambda groups, p: 1)
    begun, evaluated = [], []

    def evaluate(settings, tested, embed, **options):
        begun.append(tested)
        if when == "during an evaluation" and len(begun) == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        evaluated.append(evaluate_set(settings, tested, embed, **options))
        return evaluated[-1]

    def on_steps(step, _):
        if when == "between steps" and step == 1:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr("mpanet_jax.loop.evaluate_set", evaluate)
    with pytest.raises(Stopped, match="stopped at step 2, saved; start again with the same command") as stopped:
        train(linen, tmp_path / "run", on_steps=on_steps)
    # The step under way when the signal came is finished; the evaluation that is due is not begun, or left off.
    assert stopped.value.exit_code == (130 if when == "between steps" else 143)
    assert not evaluated and not (tmp_path / "run/metrics_best.json").exists()
    assert final_state(tmp_path / "run")[0] == 2
    train(linen, tmp_path / "run")
    assert len(evaluated) == 2  # of step 2, and of step 4
    monkeypatch.setattr("mpanet_jax.loop.evaluate_set", evaluate_set)
    train(linen, tmp_path / "whole")
    assert trees_equal(final_state(tmp_path / "run"), final_state(tmp_path / "whole"))
    best = [json.loads((tmp_path / name / "metrics_best.json").read_text()) for name in ("run", "whole")]
    assert best[0] == best[1]


def test_runs_of_several_seeds_share_their_programs(linen, tmp_path, monkeypatch):
    monkeypatch.setattr("mpanet_jax.data.sampling.most_batches", lambda groups, p: 1)
    traced = []
    monkeypatch.setattr("mpanet_jax.run_setup.train_steps", lambda *a, **k: traced.append(0) or train_steps(*a, **k))
    programs, second = Programs(), replace(linen, {"seed": 1})
    train(linen, tmp_path / "first", programs=programs)
    train(second, tmp_path / "second", programs=programs)
    assert len(traced) == 1
    train(second, tmp_path / "alone")
    assert trees_equal(final_state(tmp_path / "second"), final_state(tmp_path / "alone"))
    # Anything else makes another program.
    train(replace(second, {"optim.learning_rate": 1e-3}), tmp_path / "slower", programs=programs)
    assert not trees_equal(final_state(tmp_path / "second"), final_state(tmp_path / "slower"))


def test_best_checkpoint_is_the_one_with_the_greatest_figure(linen, tmp_path, monkeypatch):
    # The evaluations after epochs 1, 2 and 3 are given; the second is best.
    linen = replace(linen, {"train.num_epochs": 3, "train.eval_every_epochs": 1, "eval.best": "mAP"})
    figures = iter([10.0, 30.0, 20.0])
    steps = []

    def evaluate(*_, **__):
        steps.append(None)
        return {"sysu/all/single": {"rank1": 0.0, "mAP": next(figures), "mINP": 0.0}}

    monkeypatch.setattr("mpanet_jax.loop.evaluate_set", evaluate)
    last = train(linen, tmp_path / "run")
    best = json.loads((tmp_path / "run/metrics_best.json").read_text())["sysu/all/single"]
    last_step, last_model = final_state(tmp_path / "run")
    best_step, best_model = load_model(tmp_path / "run", "best")
    assert (best["checkpoint"], best["mAP"], best["step"]) == ("best", 30.0, best_step)
    assert best_step == last_step * 2 // 3 and last["sysu/all/single"]["checkpoint"] == "last"
    assert not trees_equal(last_model, jax.tree.map(np.asarray, best_model))


def test_validation_trains_without_its_identities_and_chooses_by_them(raw, linen, tmp_path, monkeypatch):
    changes = {"train.num_epochs": 2, "train.eval_every_epochs": 1, "eval.best": "mAP", "dataset.validation": True}
    lists = {
        name: [int(pid) for pid in (raw / f"exp/{name}_id.txt").read_text().split(",")] for name in ("train", "val")
    }
    linen = replace(
        linen, {**changes, "data.num_ids_per_batch": len(lists["train"]), "dataset.data_dir": str(tmp_path / "data")}
    )
    tested = []

    def evaluate(settings, tested_on, embed, **options):
        tested.append(tested_on)
        metrics = evaluate_set(settings, tested_on, embed, **options)
        if "validation" in tested_on.title:
            metrics["sysu/all/single"]["mAP"] = 60.0 - len(tested)
        return metrics

    monkeypatch.setattr("mpanet_jax.loop.evaluate_set", evaluate)
    results = train(linen, tmp_path / "run")
    assert [one.title for one in tested] == ["sysu_mm01 validation"] * 2 + ["sysu_mm01"]
    assert set(tested[0].split.pids) == set(lists["val"])
    assert results["sysu/all/single"]["protocol"] == "sysu_mm01"
    record = json.loads((tmp_path / "run/metrics_best_validation.json").read_text())["sysu/all/single"]
    last, model = load_model(tmp_path / "run")
    assert (record["mAP"], record["protocol"], record["step"]) == (59.0, "sysu_mm01_random", last // 2)
    assert model["params"]["Dense_0"]["kernel"].shape[-1] == len(lists["train"])
    assert not (tmp_path / "run/metrics_best.json").exists()
    best = evaluate_workdir(tmp_path / "run", checkpoint="best")["sysu/all/single"]
    assert (best["step"], best["protocol"]) == (last // 2, "sysu_mm01")


def test_a_model_is_tested_on_another_data_set_by_that_ones_protocol(linen, tmp_path):
    save_settings(linen, tmp_path / "run")
    write_dataset("regdb", tmp_path / "regdb", num_train_ids=2, num_test_ids=2)
    prepare("regdb", tmp_path / "regdb", tmp_path / "data", trial=3)
    command = ["scripts/evaluate.py", f"--workdir={tmp_path}/run", "--checkpoint=untrained"]
    command.append(f"--data_dir={tmp_path}/data")
    table = scripts_in_process.run([*command, "--dataset=regdb", "--trial=3"])
    assert "tested on regdb trial 3, trained on sysu_mm01" in table
    metrics = json.loads((tmp_path / "run/metrics_untrained_on_regdb3.json").read_text())
    assert set(metrics) == {"regdb/visible_to_infrared", "regdb/infrared_to_visible"}
    for values in metrics.values():
        assert (values["trained_on"], values["dataset"], values["metric"]) == (
            "sysu_mm01",
            "regdb trial 3",
            "euclidean",
        )
    save_settings(replace(linen, {"dataset": RegdbSettings(trial=2)}), tmp_path / "regdb2")
    with pytest.raises(UserError, match="was trained on regdb trial 2, which shares identities"):
        evaluate_workdir(tmp_path / "regdb2", dataset=RegdbSettings(trial=3), data_dir=str(tmp_path / "data"))
    for flags, message in (
        (["--dataset=llcm"], "llcm is not prepared in"),
        (["--dataset=llcm", "--trial=2"], "trial = 2: goes with --dataset regdb"),
        (["--trial=2"], "trial goes with --dataset"),
    ):
        with pytest.raises(Refused, match=re.escape(message)):
            scripts_in_process.run([*command, *flags])


@pytest.mark.parametrize("record", ["kept", "lost"])
def test_step_of_the_best_checkpoint_may_be_evaluated_again(linen, tmp_path, monkeypatch, record):
    # The run is finished, so it is only evaluated: a little better than before, or after a kill before the record.
    linen = replace(linen, {"eval.best": "mAP"})
    figures = iter([10.0, 10.5])
    monkeypatch.setattr(
        "mpanet_jax.loop.evaluate_set",
        lambda *_, **__: {"sysu/all/single": {"rank1": 0.0, "mAP": next(figures), "mINP": 0.0}},
    )
    train(linen, tmp_path / "run")
    if record == "lost":
        (tmp_path / "run/metrics_best.json").unlink()
    train(linen, tmp_path / "run")
    best = json.loads((tmp_path / "run/metrics_best.json").read_text())["sysu/all/single"]
    assert best["mAP"] == 10.5
    assert load_model(tmp_path / "run", "best")[0] == best["step"]


def test_evaluation_does_not_count_as_training_time(linen, tmp_path, monkeypatch):
    # On a clock by which a step takes a second and an evaluation an hour.
    changes = {"train.num_epochs": 3, "train.eval_every_epochs": 1, "train.log_every_steps": 1}
    clock, rates = [0.0], []

    def step_done(_):
        clock[0] += 1
        return clock[0]

    def evaluate(*_, **__):
        clock[0] += 3600
        return {"sysu/all/single": {"rank1": 0.0, "mAP": 0.0, "mINP": 0.0}}

    monkeypatch.setattr("mpanet_jax.loop.evaluate_set", evaluate)
    monkeypatch.setattr("mpanet_jax.metric_log.wait_until_ready", step_done)
    monkeypatch.setattr("mpanet_jax.metric_log.time", SimpleNamespace(perf_counter=lambda: clock[0]))
    monkeypatch.setattr(
        "mpanet_jax.metric_log.MetricLog.scalars",
        lambda self, step, values: rates.extend(v for name, v in values.items() if name.endswith("images_per_second")),
    )
    train(replace(linen, changes), tmp_path / "run")
    assert len(rates) >= 3 and set(rates) == {12.0}  # P·K


def test_rates_are_by_when_steps_were_finished_not_by_when_they_were_read(monkeypatch):
    clock, looked_at = [0.0], threading.Event()

    def perf_counter():
        looked_at.set()
        return clock[0]

    def time_passes(until):
        assert looked_at.wait(HANGS_AFTER)  # when the steps were finished: before anything is read
        looked_at.clear()
        clock[0] = until

    monkeypatch.setattr("mpanet_jax.metric_log.time", SimpleNamespace(perf_counter=perf_counter))
    written = []
    log = SimpleNamespace(
        advance=lambda _: None, status=lambda _: None, scalars=lambda step, values: written.append(values)
    )
    finished = []
    reader = MetricReader(log, 15, 30, 8, lambda step, when: finished.append((step, when)))
    metrics = {"loss": np.ones(15), "accuracy": np.ones(15)}
    reader.read_previous(0, 15, metrics)
    time_passes(until=3.0)  # the second call is sent off
    reader.read_previous(15, 30, metrics)
    time_passes(until=100.0)
    reader.read_last()
    assert finished == [(15, 0.0), (30, 3.0)]
    assert written[1]["train/images_per_second"] == 15 * 8 / 3


def test_no_best_checkpoint_unless_asked(linen, tmp_path):
    train(linen, tmp_path / "run")
    with pytest.raises(UserError, match="checkpoints_best"):
        load_model(tmp_path / "run", "best")


def test_finished_run_is_evaluated_again_without_training(linen, tmp_path):
    first = train(linen, tmp_path / "run")
    before = final_state(tmp_path / "run")
    again = train(linen, tmp_path / "run")
    assert trees_equal(before[1], final_state(tmp_path / "run")[1])
    assert first["sysu/all/single"]["mAP"] == again["sysu/all/single"]["mAP"]


def test_checkpoint_of_another_model_is_refused_and_config_kept(settings, finished_run, tmp_path, capfd):
    before = (tmp_path / "run/config.json").read_text()
    capfd.readouterr()
    settings = replace(settings, {"model.num_patterns": 3})
    with pytest.raises(UserError, match=r"run: holds a run with other settings, model.num_patterns = 3 \(6"):
        train(settings, tmp_path / "run")
    assert (tmp_path / "run/config.json").read_text() == before
    (tmp_path / "run/config.json").unlink()  # lost: then the shapes tell
    with pytest.raises(UserError, match=r"checkpoints/\d+: .* \(\w+/.*: .*\d.* stored, .*\d.* in the config's model\)"):
        train(settings, tmp_path / "run")
    assert "Traceback" not in capfd.readouterr().err
    assert not (tmp_path / "run/config.json").exists()


def test_run_goes_on_under_its_own_recipe_only(settings, finished_run, tmp_path):
    may_change = {"train.num_epochs": 2, "data.cache": "none", "eval.rerank": True, "model.fused": "off"}
    settings = replace(settings, may_change)
    train(settings, tmp_path / "run")
    settings = replace(settings, {"loss.student_first": True, "optim.milestones": (1,)})
    with pytest.raises(UserError, match=r"holds a run with other settings") as error:
        train(settings, tmp_path / "run")
    assert "loss.student_first = True (False before)" in str(error.value)
    assert "optim.milestones = (1,) ((29, 38) before)" in str(error.value)
    assert str(error.value).count(" before)") == 2


@pytest.mark.parametrize(
    "field, other, before", [("model.backbone", "resnet34", "resnet18"), ("method", "another", "mpanet")]
)
def test_run_of_another_backbone_or_method_is_refused(
    settings, finished_run, tmp_path, monkeypatch, field, other, before
):
    monkeypatch.setitem(METHODS, "another", METHODS["mpanet"])
    config = (tmp_path / "run/config.json").read_bytes()
    model = final_state(tmp_path / "run")
    with pytest.raises(UserError, match=rf"run: .*, {field} = '{other}' \('{before}' before\); give another"):
        train(replace(settings, {field: other, "train.num_epochs": 2}), tmp_path / "run")
    assert (tmp_path / "run/config.json").read_bytes() == config
    assert trees_equal(model, final_state(tmp_path / "run"))


def test_run_of_an_unknown_method_is_refused(settings, tmp_path):
    save_settings(settings, tmp_path / "run")
    record = tmp_path / "run/config.json"
    record.write_text(record.read_text().replace('"mpanet"', '"mpa_net"'))
    with pytest.raises(UserError, match=r"config\.json: .*method = 'mpa_net': expected one of 'mpanet'"):
        load_settings(tmp_path / "run")


def test_diverged_run_stops_and_keeps_its_last_good_checkpoint(linen, tmp_path, monkeypatch):
    linen = replace(linen, {"train.num_epochs": 2})
    monkeypatch.setattr("mpanet_jax.data.sampling.most_batches", lambda groups, p: 2)
    schedule = LinenMethod.learning_rate

    def diverging(self, steps_per_epoch):
        learning_rate = schedule(self, steps_per_epoch)
        return lambda step: jnp.where(step < 2, learning_rate(step), jnp.nan)

    monkeypatch.setattr(LinenMethod, "learning_rate", diverging)
    # Step 3 makes the weights NaN, step 4 is the first to see it, and the last before a checkpoint.
    with pytest.raises(UserError, match=r"step 4: the loss is nan; lower optim.learning_rate"):
        train(linen, tmp_path / "run")
    assert final_state(tmp_path / "run")[0] == 2
    check_report(tmp_path / "run", step=4, num_images=12)


def check_report(workdir, step, num_images):
    report = json.loads((workdir / "nonfinite.json").read_text())
    assert report["step"] == step and len(set(report["images"])) == num_images
    assert all(re.fullmatch(r"cam\d/\d+/\d+\.jpg", path) for path in report["images"])
    assert report["terms"]["loss"] == "nan" and "cross_entropy" in report["terms"]


def test_state_that_is_not_finite_is_not_saved(linen, tmp_path, monkeypatch):
    # The only step's loss is finite, the weights after it are not.
    monkeypatch.setattr("mpanet_jax.data.sampling.most_batches", lambda groups, p: 1)
    monkeypatch.setattr(LinenMethod, "learning_rate", lambda self, steps_per_epoch: lambda step: jnp.nan)
    with pytest.raises(UserError, match=r"step 1: the weights are not finite any more; lower optim"):
        train(linen, tmp_path / "run")
    assert latest_step(tmp_path / "run") is None


def test_weights_alone_are_no_run_to_go_on_with(linen, tmp_path):
    train(linen, tmp_path / "run")
    for item in ("training", "data"):
        shutil.rmtree(next((tmp_path / "run/checkpoints").glob(f"[0-9]*/{item}")))
    next((tmp_path / "run/checkpoints").glob(f"[0-9]*/{CHECKSUMS_FILE}")).unlink()  # nobody says that more was there
    linen = replace(linen, {"train.num_epochs": 2})
    with pytest.raises(UserError, match=r"checkpoints/\d+: lacks the data and training, .*init_from"):
        train(linen, tmp_path / "run")


def test_unattended_run_goes_on_from_the_last_sound_checkpoint(linen, tmp_path, capfd, monkeypatch):
    linen = replace(linen, {"train.num_epochs": 2})
    monkeypatch.setattr("mpanet_jax.data.sampling.most_batches", lambda groups, p: 1)
    train(linen, tmp_path / "run")
    whole = final_state(tmp_path / "run")
    newest = tmp_path / "run/checkpoints/2"
    for path in newest.glob("model/**/d/*"):
        os.truncate(path, path.stat().st_size // 2)
    with pytest.raises(Refused, match=re.escape(f"{newest}: this checkpoint is damaged (")):
        scripts_in_process.run(["scripts/evaluate.py", f"--workdir={tmp_path}/run"])
    capfd.readouterr()
    train(linen, tmp_path / "run")
    assert f"{newest}: damaged (" in capfd.readouterr().err
    assert trees_equal(whole, final_state(tmp_path / "run"))


def damage_images(settings, split, paths):
    """Flips a bit in the records of 'train' or 'test' by which some of the images `paths`, and no others, are lost."""

    def is_lost(images, row):
        try:
            return not encoded_image(images, row)
        except UserError:
            return True

    (records,) = datasets.prepared_dir(settings.dataset).glob(f"*-{split}.array_record*")
    sound = records.read_bytes()
    for place in range(0, len(sound), 997):
        records.write_bytes(sound[:place] + bytes([sound[place] ^ 1]) + sound[place + 1 :])
        try:
            images = datasets.load_split(settings.dataset, split)
        except UserError:  # so that the file cannot be opened
            continue
        lost = [path for row, path in enumerate(images.paths) if is_lost(images, row)]
        if lost and set(lost) <= set(paths):
            return lost
    raise AssertionError("no place does it")


@pytest.mark.parametrize("damaged", ["train", "test", "val", "image cache", "permutation file"])
def test_damaged_data_are_found_before_anything_is_saved(raw, linen, tmp_path, damaged):
    changes = {"dataset.data_dir": str(tmp_path / "data")}
    if damaged == "val":
        pids = (raw / "exp/train_id.txt").read_text().split(",")
        changes |= {"dataset.validation": True, "data.num_ids_per_batch": len(pids)}
    settings = replace(linen, changes)
    folder = datasets.prepare(settings.dataset)
    if damaged == "permutation file":
        file = folder / "rand_perm_cam.mat"
        os.truncate(file, file.stat().st_size // 2)
        message = f"{file}: no readable MATLAB 5 file"
    elif damaged == "image cache":
        split = datasets.open_split(settings.dataset, "train")
        _, images = open_images(split, settings.data, tmp_path / "data/cache")
        file = Path(images.filename)
        data = bytearray(file.read_bytes())
        data[len(data) // 2] ^= 1
        file.write_bytes(data)
        message = f"{file}: the image cache is damaged"
    else:
        if damaged == "train":
            images = datasets.open_split(settings.dataset, "train")
        else:
            images = datasets.open_evaluation(settings.dataset, validation=damaged == "val").split
        lost = damage_images(settings, "test" if damaged == "test" else "train", images.paths)
        message = f"image ({'|'.join(lost)}) can't be read, its record in the prepared data is damaged"
    with pytest.raises(UserError, match=f"^{message}"):
        train(settings, tmp_path / "run")
    assert latest_step(tmp_path / "run") is None
    if damaged in ("train", "permutation file"):
        assert not (tmp_path / "run").exists()


BAD_RECORDS = ["{", "[]", "{}\n{}", '{"sysu/all/single": {}}', '{"sysu/all/single": {"mAP": "high"}}']


@pytest.mark.parametrize("record", BAD_RECORDS)
def test_damaged_record_of_the_best_is_found_before_the_first_step(settings, tmp_path, record):
    path = tmp_path / "run/metrics_best.json"
    path.parent.mkdir()
    path.write_text(record)
    with pytest.raises(UserError, match=f"^{path}: not the record of a best evaluation"):
        train(replace(settings, {"eval.best": "mAP"}), tmp_path / "run")
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_official_preset_changes_what_method_lists():
    paper, official = sysu_config.get_config(), sysu_config.get_config("official")
    assert (paper.loss.modality_identity, official.loss.modality_identity) == (0.5, 1.0)
    assert (paper.loss.per_modality_identity, official.loss.per_modality_identity) == (True, False)
    assert (paper.loss.student_first, official.loss.student_first) == (False, True)
    assert (paper.augment.crop_padding, official.augment.crop_padding) == (0, 10)
    paper_rate, official_rate = (
        make_method(settings_of(config.to_dict())).average_rate(steps_per_epoch=10) for config in (paper, official)
    )
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
    settings_of(config.to_dict())
    config[section][field] = value
    with pytest.raises(SettingsError, match=rf"^{section}\.{field} = .*(expected|has to divide)"):
        settings_of(config.to_dict())


def start_script(name, *arguments, cwd):
    return subprocess.run(
        [sys.executable, str(ROOT / "scripts" / name), *arguments],
        capture_output=True,
        text=True,
        cwd=cwd,
        env=os.environ | {"PYTHONPATH": str(ROOT), "HOME": str(cwd)},
    )


BAD_TRAINING = {
    "missing data root": (["--config.dataset.source=/does/not/exist"], "config.dataset.source"),
    "no data root at all": (["--config.dataset.source="], "prepare_data.py"),
    "unknown field": (["--config.optim.learnin_rate=1"], "'learnin_rate'; did you mean 'learning_rate'?"),
    "unknown group": (["--config.modle.width=8"], "'modle'; did you mean 'model'?"),
    "no such method": (
        ["--config.method=mpa_net"],
        "--config.method = 'mpa_net': expected one of 'mpanet', 'agw', 'caj'; did you",
    ),
    "no such backbone": (["--config.model.backbone=resnet_50"], "; did you mean 'resnet50'?"),
    "no such data set": (["--config.dataset.name=sysu"], "; did you mean 'sysu_mm01'?"),
    "unknown preset": (["PRESET"], "unknown preset"),
    "P does not fit": (["--config.data.num_ids_per_batch=99"], "config.data.num_ids_per_batch"),
    "K is odd": (["--config.data.images_per_id=5"], "config.data.images_per_id"),
    "value of the wrong type": (["--config.data.height=tall"], "config.data.height"),
    "seed of 20 digits": ([f"--config.seed={10**20}"], f"--config.seed = {10**20}: expected a number from 0"),
    "milestones of text": (["--config.optim.milestones=('a','b')"], "config.optim.milestones"),
    "half a block": (["--config.model.stage_sizes=(1.5,1,1,1)"], "config.model.stage_sizes"),
    "nothing to learn": (
        [f"--config.loss.{term}=0" for term in TERMS],
        "--config.loss.identity = 0.0: all weights are 0, so nothing is learned",
    ),
    "no such module": (
        ["--config.model.channel_module=mamm"],
        "--config.model.channel_module = 'mamm': expected",
    ),
    "preset by its field": (["--config.preset=official"], "--config=configs/NAME.py:official"),
    "no such trial": (["--config.dataset.name=regdb", "--config.dataset.trial=11"], "config.dataset.trial"),
    "not a flag": (["extra"], "extra: not a flag"),
    "empty workdir": (["--workdir="], "--workdir: is empty"),
    "one of several, alone": (["--num_processes=2"], "--num_processes goes with --distributed"),
    "weights that are not there": (["--config.init_from=/no/such/file.safetensors"], "/no/such/file.safetensors"),
}


# One of each kind in a process of its own: a flag that cannot be parsed, a field, and what the data show.
ALONE = {"unknown field", "no such backbone", "P does not fit"}


@pytest.mark.parametrize("case", BAD_TRAINING)
def test_bad_input_is_one_line_and_exit_code_2(case, raw, tmp_path):
    arguments, named = BAD_TRAINING[case]
    config_flag = f"--config={ROOT}/configs/synthetic.py"
    if arguments == ["PRESET"]:
        config_flag, arguments = config_flag + ":mistake", []
    result = (start_script if case in ALONE else process)(
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


def test_fused_form_that_a_network_lacks_is_refused_before_anything_is_written(raw, tmp_path):
    config = [f"--config={ROOT}/configs/synthetic.py", f"--config.dataset.source={raw}", "--workdir=run"]
    result = process("train.py", *config, "--config.model.backbone=resnet18", "--config.model.fused=on", cwd=tmp_path)
    assert result.returncode == 2 and result.stderr.count("\n") == 1, result.stderr
    assert result.stderr.startswith("error: --config.model.fused = 'on': the network of method 'mpanet' with backbone")
    assert "'resnet18' has no fused form; use 'auto' or 'off'" in result.stderr
    assert not list(tmp_path.iterdir())


def test_config_file_that_is_not_there(tmp_path):
    result = process("train.py", "--config=configs/none.py", "--workdir=run", cwd=tmp_path)
    assert result.returncode == 2 and result.stderr.count("\n") == 1, result.stderr
    assert result.stderr.startswith("error: --config: No such file") and "configs/none.py" in result.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("content", [None, "# A page — no program", "raise KeyError('x')", "x = 1"])
def test_config_file_that_is_none(tmp_path, content):
    path = tmp_path / "config.py"
    path.mkdir() if content is None else path.write_text(content)
    result = process("train.py", f"--config={path}", "--workdir=run", cwd=tmp_path)
    assert result.returncode == 2 and result.stderr.count("\n") == 1, result.stderr
    assert result.stderr.startswith("error: --config: cannot be read"), result.stderr
    assert not (tmp_path / "run").exists()


def test_workdir_that_cannot_be_made(settings, tmp_path):
    (tmp_path / "file").touch()
    result = process(
        "train.py",
        f"--config={ROOT}/configs/synthetic.py",
        f"--config.dataset.data_dir={settings.dataset.data_dir}",
        f"--config.dataset.source={settings.dataset.source}",
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
    result = process(
        "train.py",
        f"--config={ROOT}/configs/synthetic.py",
        f"--config.dataset.source={tmp_path}/raw",
        "--workdir=run",
        cwd=tmp_path,
    )
    assert result.returncode == 2 and "rand_perm_cam.mat" in result.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("missing", ["folder", "checkpoint"])
def test_evaluate_without_a_checkpoint(missing, tmp_path, settings):
    if missing == "checkpoint":
        save_settings(settings, tmp_path / "run")
    result = process("evaluate.py", "--workdir=run", cwd=tmp_path)
    assert result.returncode == 2 and "Traceback" not in result.stderr
    assert "run" in result.stderr.strip().splitlines()[-1]
    assert not (tmp_path / "run/metrics.json").exists()
