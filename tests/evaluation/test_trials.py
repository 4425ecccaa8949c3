import json

import pytest

from mpanet_jax.errors import UserError
from mpanet_jax.evaluation.evaluate import FIGURES
from mpanet_jax.evaluation.trials import average_trials, evaluate_workdirs

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


def run(folder, trial, name="regdb"):
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"dataset": {"name": name, "trial": trial}}))


def test_working_directories_are_averaged(tmp_path):
    for trial in (1, 2, 10):
        run(tmp_path / f"regdb_{trial}", trial)
    (tmp_path / "regdb_notes").mkdir()  # no run
    averaged = evaluate_workdirs(
        str(tmp_path / "regdb_*"), lambda workdir: metrics(int(workdir.name.split("_")[1]), 70.0)
    )
    assert averaged[SETTINGS[0]]["trial_numbers"] == [1, 2, 10]


def test_wrong_splits_are_refused(tmp_path):
    run(tmp_path / "regdb_1", 1)
    run(tmp_path / "regdb_2", 2)
    pattern = str(tmp_path / "regdb_*")
    with pytest.raises(UserError, match=r"regdb_2: was trained on trial 2, but .* tested on trial 1"):
        evaluate_workdirs(pattern, lambda workdir: metrics(1, 70.0))
    run(tmp_path / "regdb_3", 2)
    with pytest.raises(UserError, match=r"regdb_3: was trained on trial 2, as was .*regdb_2"):
        evaluate_workdirs(pattern, lambda workdir: pytest.fail("evaluated before the check"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{}", "not a training run's config"),
        ("nonsense", "not a training run's config"),
        ('{"dataset": {"name": "sysu_mm01"}}', "only RegDB"),
        ('{"dataset": {"name": "regdb"}}', "dataset.trial is None"),
        ('{"dataset": {"name": "regdb", "trial": 11}}', "dataset.trial is 11"),
    ],
)
def test_directories_without_a_trial_are_refused(tmp_path, text, message):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(UserError, match=message):
        evaluate_workdirs(str(tmp_path), lambda workdir: metrics(1, 70.0))
    with pytest.raises(UserError, match="no working directory"):
        evaluate_workdirs(str(tmp_path / "none*"), lambda workdir: metrics(1, 70.0))
