"""Averages the metrics of several trained models: RegDB's ten trials, or one recipe with several seeds."""

import glob
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mpanet_jax.errors import ArgumentError, UserError
from mpanet_jax.evaluation.metrics import FIGURES
from mpanet_jax.run_files import CONFIG_FILE, load_settings, recipe_differences
from mpanet_jax.settings import Settings

# What must be the same for all models; embeddings from files have no 'checkpoint'.
_HOW = ("flip", "rerank", "protocol", "metric", "cmc", "checkpoint")


def average_trials(trials: Sequence[Mapping[str, Mapping]], names: Sequence[str] | None = None) -> dict[str, dict]:
    """Average the metrics of models that were trained on different splits.

    Args:
      trials: what `evaluate_embeddings` gives for each model; every setting has its 'trial'.
      names: what error messages call the models, such as their workdirs.

    Returns:
      {setting: metrics} with the mean figures, 'std' (population standard deviation over the models), 'trials' (the
      number of models) and 'trial_numbers'. There is no 'interval', since each model has other test identities.

    Raises:
      UserError: there are no metrics, a trial is missing or comes twice, or metrics were measured in different ways.
    """
    names = _names(trials, names)
    averaged = _average(trials, names, _HOW)
    for setting, values in averaged.items():
        for name, metrics in zip(names, trials, strict=True):
            if metrics[setting].get("trial") is None:
                raise UserError(
                    f"{name}: {setting} names no trial; evaluate a model that was trained on one trial's split"
                )
        numbers = [int(metrics[setting]["trial"]) for metrics in trials]
        _refuse_repeated(numbers, names, "is of trial", "is", "expected one model for each trial")
        values.update(trials=len(trials), trial_numbers=sorted(numbers))
    return averaged


def average_seeds(
    results: Sequence[Mapping[str, Mapping]], seeds: Sequence[int], names: Sequence[str] | None = None
) -> dict[str, dict]:
    """Average the metrics of models that differ in the seed of their training.

    Args:
      results: what `evaluate_embeddings` gives for each model.
      seeds: the seed that each model was trained with.
      names: as in `average_trials`.

    Returns:
      {setting: metrics} with the mean figures, 'std' (population standard deviation over the models), 'seeds', and
      'trials', the number of galleries that each model was tested on. There is no 'interval'.

    Raises:
      UserError: there are no metrics, a seed comes twice, metrics were measured in different ways, or the last
        checkpoints are of different steps, so one of the runs has not finished.
    """
    names = _names(results, names)
    _refuse_repeated(seeds, names, "was trained with seed", "was", "expected runs with different seeds")
    last = all(values.get("checkpoint") == "last" for metrics in results for values in metrics.values())
    averaged = _average(results, names, (*_HOW, "trials", *(("step",) if last else ())))
    for values in averaged.values():
        values["seeds"] = sorted(seeds)
    return averaged


def _names(results: Sequence, names: Sequence[str] | None) -> list[str]:
    if not results:
        raise UserError("no trained models to average; expected the metrics of at least one")
    return list(names or [f"metrics {i + 1}" for i in range(len(results))])


def _refuse_repeated(values: Sequence[int], names: Sequence[str], what: str, verb: str, expected: str) -> None:
    for index, value in enumerate(values):
        if value in values[:index]:
            raise UserError(f"{names[index]}: {what} {value}, as {verb} {names[values.index(value)]}; {expected}")


def _average(results: Sequence[Mapping[str, Mapping]], names: Sequence[str], how: Sequence[str]) -> dict[str, dict]:
    first = results[0]
    for name, metrics in zip(names, results, strict=True):
        if set(metrics) != set(first):
            raise UserError(f"{name}: has settings {sorted(metrics)}, but {names[0]} has {sorted(first)}")
        for setting, values in metrics.items():
            for key in how:
                if values.get(key) != first[setting].get(key):
                    raise UserError(
                        f"{name}: {setting} was measured with {key} {values.get(key)}, {names[0]} with "
                        f"{first[setting].get(key)}; evaluate all models in the same way"
                    )
    averaged: dict[str, dict[str, Any]] = {}
    for setting in first:
        values = {name: [metrics[setting][name] for metrics in results] for name in FIGURES}
        averaged[setting] = {
            **{name: float(np.mean(values[name])) for name in FIGURES},
            "std": {name: float(np.std(values[name])) for name in FIGURES},
            **{key: first[setting][key] for key in how if key in first[setting]},
            **{
                key: int(np.mean([metrics[setting][key] for metrics in results]))
                for key in ("num_query", "num_query_without_match", "num_gallery")
            },
        }
    return averaged


def evaluate_workdirs(workdirs: str, evaluate: Callable[[Path], Mapping[str, Mapping]]) -> dict[str, dict]:
    """Evaluate the runs in all workdirs that match a pattern, and average their metrics.

    On a data set with several splits (`dataset.trial`: RegDB) there must be one run for each trial, on any other data
    set one for each seed. The runs are checked against one another before the first is evaluated.

    Args:
      workdirs: a pattern, such as 'runs/regdb_*'; folders without a config.json are ignored.
      evaluate: gives the metrics of the run in a workdir.

    Returns:
      What `average_trials` or `average_seeds` gives.

    Raises:
      ArgumentError: no workdir with a config.json matches.
      UserError: as for `average_trials` or `average_seeds`; or the runs have different recipes; or a run was tested on
        another split than it was trained on.
    """
    found = sorted(path for path in map(Path, glob.glob(workdirs)) if (path / CONFIG_FILE).is_file())
    if not found:
        raise ArgumentError(
            "workdirs", f"= {workdirs}: no folder with a {CONFIG_FILE} matches; expected runs' workdirs"
        )
    names = [str(workdir) for workdir in found]
    runs = [load_settings(workdir) for workdir in found]
    _refuse_other_recipes(runs, names)
    trials = [run.dataset.trial for run in runs if run.dataset.trial is not None]
    if trials:
        _refuse_repeated(trials, names, "was trained on trial", "was", "expected one model for each trial")
    else:
        _refuse_repeated([run.seed for run in runs], names, "was trained with seed", "was", "expected different seeds")
    results = []
    for workdir, run in zip(found, runs, strict=True):
        metrics = evaluate(workdir)
        refuse_other_trial(workdir, run.dataset.trial, metrics)
        results.append(metrics)
    return average_trials(results, names) if trials else average_seeds(results, [run.seed for run in runs], names)


def _refuse_other_recipes(runs: Sequence[Settings], names: Sequence[str]) -> None:
    varied = "dataset.trial" if runs[0].dataset.trial is not None else "seed"
    for run, name in zip(runs, names, strict=True):
        differences = recipe_differences(run, runs[0])
        for field in sorted(differences, key=lambda field: field not in ("dataset.name", "method")):
            if field not in ("seed", varied):
                value, first = differences[field]
                raise UserError(
                    f"{name}: {field} is {value!r}, but {first!r} in {names[0]}; "
                    f"expected runs of one recipe, which differ in {varied} alone"
                )


def refuse_other_trial(workdir: Path, trained: int | None, metrics: Mapping[str, Mapping]) -> None:
    """Check that a model was tested on the split that it was trained on.

    RegDB's splits share identities, so about half of another split's test identities were in the training.

    Args:
      workdir: the run, for the error.
      trained: the trial it was trained on; None: the data set has only one split.
      metrics: {setting: metrics} with 'trial'.

    Raises:
      UserError: a setting's trial is not `trained`.
    """
    for setting, values in metrics.items():
        if trained is not None and values.get("trial") != trained:
            raise UserError(
                f"{workdir}: was trained on trial {trained}, but {setting} was tested on trial {values.get('trial')}, "
                f"about half of whose test identities were in the training; evaluate it on trial {trained}"
            )
