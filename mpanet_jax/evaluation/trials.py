"""RegDB's ten trials: ten models, each trained and tested on its own split, averaged into one line of a table."""

import glob
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from mpanet_jax.errors import UserError
from mpanet_jax.evaluation.evaluate import FIGURES


def average_trials(trials: Sequence[Mapping[str, Mapping]], names: Sequence[str] | None = None) -> dict[str, dict]:
    """Average the metrics of models that were trained on different splits.

    Args:
      trials: one `evaluate_embeddings` result for each model; every setting carries its 'trial'.
      names: what error messages call them, e.g. their working directories.

    Returns:
      the same settings with the mean figures, 'std' (population standard deviation over the models), 'trials' (their
      number) and 'trial_numbers'.

    Raises:
      UserError: no metrics, a missing trial number, a trial that comes twice, or metrics measured in different ways.
    """
    names = list(names or [f"metrics {i + 1}" for i in range(len(trials))])
    if not trials:
        raise UserError("--workdirs: no trained models to average; expected one working directory for each trial")
    how = ("rerank", "protocol", "metric", "cmc", "checkpoint")  # the last of them only where models are evaluated
    for name, metrics in zip(names, trials, strict=True):
        if set(metrics) != set(trials[0]):
            raise UserError(f"{name}: has settings {sorted(metrics)}, but {names[0]} has {sorted(trials[0])}")
        for setting, values in metrics.items():
            if values.get("trial") is None:
                raise UserError(
                    f"{name}: {setting} names no trial; evaluate a model that was trained on one trial's split"
                )
            for key in how:
                if values.get(key) != trials[0][setting].get(key):
                    raise UserError(
                        f"{name}: {setting} was measured with {key} {values.get(key)}, {names[0]} with "
                        f"{trials[0][setting].get(key)}; evaluate all models in the same way"
                    )
    averaged = {}
    for setting in trials[0]:
        numbers = [int(metrics[setting]["trial"]) for metrics in trials]
        for index, number in enumerate(numbers):
            if number in numbers[:index]:
                raise UserError(
                    f"{names[index]}: is of trial {number}, as is {names[numbers.index(number)]}; "
                    "expected one model for each trial"
                )
        values = {name: [metrics[setting][name] for metrics in trials] for name in FIGURES}
        averaged[setting] = {
            **{name: float(np.mean(values[name])) for name in FIGURES},
            "std": {name: float(np.std(values[name])) for name in FIGURES},
            **{key: trials[0][setting][key] for key in how if key in trials[0][setting]},
            "trials": len(trials),
            "trial_numbers": sorted(numbers),
            **{
                key: int(np.mean([metrics[setting][key] for metrics in trials]))
                for key in ("num_query", "num_query_without_match", "num_gallery")
            },
        }
    return averaged


def evaluate_workdirs(pattern: str, evaluate: Callable[[Path], Mapping[str, Mapping]]) -> dict[str, dict]:
    """Evaluate the model of every working directory that `pattern` matches ('runs/regdb_*') and average them.

    `evaluate(workdir)` gives one model's metrics. Raises UserError as `average_trials` does, and for a model that was
    tested on another split than the `dataset.trial` of its config.json, before any figure is averaged.
    """
    workdirs = sorted(path for path in map(Path, glob.glob(pattern)) if (path / "config.json").is_file())
    if not workdirs:
        raise UserError(f"--workdirs: no working directory with a config.json matches {pattern!r}")
    trained = [read_trial(workdir) for workdir in workdirs]
    for index, trial in enumerate(trained):  # before hours of evaluation
        if trial in trained[:index]:
            raise UserError(
                f"{workdirs[index]}: was trained on trial {trial}, as was {workdirs[trained.index(trial)]}; "
                "expected one model for each trial"
            )
    trials = []
    for workdir, trial in zip(workdirs, trained, strict=True):
        metrics = evaluate(workdir)
        refuse_other_trial(workdir, trial, metrics)
        trials.append(metrics)
    return average_trials(trials, [str(workdir) for workdir in workdirs])


def read_trial(workdir: Path) -> int:
    """The split a RegDB model was trained on: `dataset.trial` of the working directory's config.json."""
    path = Path(workdir) / "config.json"
    try:
        dataset = json.loads(path.read_text())["dataset"]
        name, trial = dataset["name"], dataset.get("trial")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path}: not a training run's config with dataset.name and dataset.trial ({error!r})"
        ) from error
    if name != "regdb":
        raise UserError(f"{path}: dataset.name is {name!r}; only RegDB's trials are averaged over working directories")
    if isinstance(trial, bool) or not isinstance(trial, int) or not 1 <= trial <= 10:
        raise UserError(f"{path}: dataset.trial is {trial!r}; expected RegDB's split, 1 to 10")
    return trial


def refuse_other_trial(workdir: Path, trained: int, metrics: Mapping[str, Mapping]) -> None:
    """Raise UserError if `metrics` were measured on another split than the model was trained on.

    RegDB's splits share identities: a model tested on another trial's split has seen most of its test identities.
    """
    for setting, values in metrics.items():
        if values.get("trial") != trained:
            raise UserError(
                f"{workdir}: was trained on trial {trained}, but {setting} was tested on trial {values.get('trial')}: "
                f"about half of its test identities were trained on; evaluate it on trial {trained}"
            )
