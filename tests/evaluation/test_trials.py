import pytest

from mpanet_jax.errors import UserError
from mpanet_jax.evaluation.metrics import FIGURES
from mpanet_jax.evaluation.metrics_output import format_table
from mpanet_jax.evaluation.trials import average_seeds, average_trials, evaluate_workdirs
from mpanet_jax.methods import METHODS, Entry, settings_of
from mpanet_jax.methods.mpanet import MPANet, MPANetSettings
from mpanet_jax.run_files import save_settings
from mpanet_jax.settings_base import replace

SETTINGS = ("regdb/visible_to_infrared", "regdb/infrared_to_visible")


def metrics(trial, rank1, **changes):
    values = {
        **dict.fromkeys(FIGURES, 10.0),
        "rank1": rank1,
        "std": dict.fromkeys(FIGURES, 0.0),
        "rerank": False,
        "protocol": "regdb",
        "metric": "euclidean",
        "cmc": "identity",
        "trials": 1,
        "num_query": 2060,
        "num_query_without_match": 0,
        "num_gallery": 2060,
        "trial": trial,
        **changes,
    }
    return {setting: dict(values) for setting in SETTINGS}


def test_mean_and_standard_deviation_by_hand():
    averaged = average_trials([metrics(t, r, checkpoint="last") for t, r in ((1, 80.0), (4, 90.0), (2, 82.0))])
    values = averaged["regdb/infrared_to_visible"]
    assert values["checkpoint"] == "last"
    assert values["rank1"] == pytest.approx(84)
    assert values["std"]["rank1"] == pytest.approx(((16 + 36 + 4) / 3) ** 0.5)
    assert values["std"]["mAP"] == 0
    assert (values["trials"], values["trial_numbers"], values["num_query"]) == (3, [1, 2, 4], 2060)


@pytest.mark.parametrize(
    ("trials", "message"),
    [
        ([], "no trained models"),
        ([metrics(1, 80.0), metrics(1, 81.0)], "trial 1, as is metrics 1"),
        ([metrics(1, 80.0), metrics(None, 81.0)], "names no trial"),
        ([metrics(1, 80.0), metrics(2, 81.0, rerank=True)], "rerank"),
        ([metrics(1, 80.0), metrics(2, 81.0, metric="cosine")], "metric cosine"),
        ([metrics(1, 80.0, checkpoint="last"), metrics(2, 81.0, checkpoint="best")], "checkpoint best"),
        ([metrics(1, 80.0), {"sysu/all/single": {}}], "settings"),
    ],
)
def test_what_cannot_be_averaged_is_refused(trials, message):
    with pytest.raises(UserError, match=message):
        average_trials(trials)


def test_seeds_are_averaged():
    def of_seed(rank1, **changes):
        values = metrics(None, rank1, trials=10, protocol="sysu_mm01", interval={}, step=7, checkpoint="last")
        return {setting: {k: v for k, v in {**v, **changes}.items() if k != "trial"} for setting, v in values.items()}

    averaged = average_seeds([of_seed(60.0), of_seed(66.0)], [5, 2])["regdb/visible_to_infrared"]
    assert (averaged["rank1"], averaged["std"]["rank1"]) == (63, 3)
    assert (averaged["seeds"], averaged["trials"], averaged["checkpoint"]) == ([2, 5], 10, "last")
    assert "interval" not in averaged and "trial" not in averaged
    assert "2 seeds, 10 trials each" in format_table({"sysu/all/single": averaged})
    with pytest.raises(UserError, match="metrics 2: was trained with seed 5, as was metrics 1"):
        average_seeds([of_seed(60.0), of_seed(66.0)], [5, 5])
    with pytest.raises(UserError, match="step 8"):  # one of them has not finished
        average_seeds([of_seed(60.0), of_seed(66.0, step=8)], [5, 2])
    with pytest.raises(UserError, match="trials 1"):
        average_seeds([of_seed(60.0), of_seed(66.0, trials=1)], [5, 2])
    with pytest.raises(UserError, match="no trained models"):
        average_seeds([], [])
    best = [of_seed(60.0, checkpoint="best"), of_seed(66.0, checkpoint="best", step=8)]
    assert average_seeds(best, [1, 2])["regdb/visible_to_infrared"]["checkpoint"] == "best"


def run(folder, trial=1, name="regdb", **changes):
    trial = {"trial": trial} if name == "regdb" else {}
    save_settings(replace(settings_of({"dataset": {"name": name, **trial}}), changes), folder)


def test_working_directories_are_averaged(tmp_path):
    for trial in (1, 2, 10):
        run(tmp_path / f"regdb_{trial}", trial, seed=trial % 2)
    (tmp_path / "regdb_notes").mkdir()  # no run
    averaged = evaluate_workdirs(
        str(tmp_path / "regdb_*"), lambda workdir: metrics(int(workdir.name.split("_")[1]), 70.0)
    )
    assert averaged[SETTINGS[0]]["trial_numbers"] == [1, 2, 10]


def without_trial(rank1):
    return {setting: {k: v for k, v in values.items() if k != "trial"} for setting, values in metrics(0, rank1).items()}


@pytest.mark.parametrize("name", ["sysu_mm01", "llcm"])
def test_working_directories_of_seeds_are_averaged(name, tmp_path):
    for seed in (1, 2, 3):
        # What alters no number of the training may differ.
        run(tmp_path / f"seed{seed}", name=name, seed=seed, **{"dataset.data_dir": str(seed), "data.cache": "host"})
    averaged = evaluate_workdirs(str(tmp_path / "seed*"), lambda workdir: without_trial(60.0 + int(workdir.name[-1])))
    assert averaged[SETTINGS[0]]["seeds"] == [1, 2, 3]
    assert averaged[SETTINGS[0]]["rank1"] == pytest.approx(62)
    assert averaged[SETTINGS[0]]["std"]["rank1"] == pytest.approx((2 / 3) ** 0.5)


def unwanted(workdir):
    pytest.fail("evaluated before the check")


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        ({"seed": 4}, {"seed": 4}, "b: was trained with seed 4, as was .*a; expected different seeds"),
        ({}, {"name": "llcm", "seed": 2}, "b: dataset.name is 'llcm', but 'sysu_mm01' in .*a"),
        ({}, {"name": "regdb", "seed": 2}, "b: dataset.name is 'regdb', but 'sysu_mm01' in .*a"),
        ({}, {"seed": 2, "optim.learning_rate": 0.5}, "b: optim.learning_rate is 0.5, but 0.00035 in .*seed alone"),
        (
            {"name": "regdb", "trial": 1},
            {"name": "regdb", "trial": 2, "loss.margin": 0.5},
            "b: loss.margin is 0.5, but 0.7 in .*dataset.trial alone",
        ),
    ],
)
def test_runs_that_do_not_belong_together_are_refused(first, second, message, tmp_path):
    run(tmp_path / "a", **{"name": "sysu_mm01", **first})
    run(tmp_path / "b", **{"name": "sysu_mm01", **second})
    with pytest.raises(UserError, match=message) as error:
        evaluate_workdirs(str(tmp_path / "*"), unwanted)
    assert "\n" not in str(error.value)


def test_runs_of_different_methods_are_refused(tmp_path, monkeypatch):
    class OtherSettings(MPANetSettings):
        pass

    monkeypatch.setitem(METHODS, "other", Entry(MPANet, OtherSettings))
    run(tmp_path / "a", name="sysu_mm01")
    run(tmp_path / "b", name="sysu_mm01", seed=2, method="other")
    with pytest.raises(UserError, match=r"b: method is 'other', but 'mpanet' in .*a"):
        evaluate_workdirs(str(tmp_path / "*"), unwanted)


def test_wrong_splits_are_refused(tmp_path):
    run(tmp_path / "regdb_1", 1)
    run(tmp_path / "regdb_2", 2)
    pattern = str(tmp_path / "regdb_*")
    with pytest.raises(UserError, match=r"regdb_2: was trained on trial 2, but .* tested on trial 1"):
        evaluate_workdirs(pattern, lambda workdir: metrics(1, 70.0))
    run(tmp_path / "regdb_3", 2)
    with pytest.raises(UserError, match=r"regdb_3: was trained on trial 2, as was .*regdb_2"):
        evaluate_workdirs(pattern, unwanted)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{}", "config.json: not a run's settings"),
        ("nonsense", "config.json: not a run's settings"),
        ('{"dataset": {"name": "regdb", "trial": 11}, "model": {}, "data": {}}', "config.json: .*dataset.trial = 11"),
    ],
)
def test_directories_without_a_trial_are_refused(tmp_path, text, message):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(UserError, match=message):
        evaluate_workdirs(str(tmp_path), unwanted)
    with pytest.raises(UserError, match="workdirs"):
        evaluate_workdirs(str(tmp_path / "none*"), unwanted)
