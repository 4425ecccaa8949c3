"""Evaluates a trained run: restores the model, embeds the test images, applies the data set's protocols."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from mpanet_jax import datasets
from mpanet_jax.checkpoint import load_model
from mpanet_jax.data.pipeline import split_batches
from mpanet_jax.datasets import EvaluationSet, Split
from mpanet_jax.embeddings import Embeddings, check_embeddings
from mpanet_jax.errors import UserError
from mpanet_jax.evaluation.evaluate import evaluate_embeddings
from mpanet_jax.evaluation.extract import Embed, extract_embeddings, make_trained_embed, track_batches, with_images
from mpanet_jax.methods import make_method
from mpanet_jax.processes import gather_shares, is_first_process, share_of_process
from mpanet_jax.protocol import Protocol
from mpanet_jax.run_files import load_settings
from mpanet_jax.settings import DatasetSettings, DataSettings, Settings
from mpanet_jax.settings_base import replace
from mpanet_jax.weights.convert import initial_variables
from mpanet_jax.weights.names import Variables


def embed_rows(split: Split, rows: np.ndarray, embed: Embed, data: DataSettings, batch_size: int) -> Embeddings:
    """Embed images of a split; several processes embed a share each, and every process gets all embeddings.

    Args:
      split: the prepared split.
      rows: int[N], the images to embed.
      embed: the network, compiled.
      data: how images are read and resized.
      batch_size: images at once on this process's devices, rounded up to a multiple of their number.

    Returns:
      N embeddings, in the order of `rows`.
    """
    # Every device gets the same number of rows.
    num_devices = jax.local_device_count()
    batch_size = -(-batch_size // num_devices) * num_devices
    own = share_of_process(rows)
    batches = with_images(split_batches(split, own, data, batch_size), data)
    batches = track_batches(batches, len(own), active=is_first_process())
    share = extract_embeddings(embed, batches, split.paths, len(own))
    features = gather_shares(share.features, len(rows), "the embeddings of the test set")
    pid_names = None if split.pid_names is None else split.pid_names[rows]
    return Embeddings(
        features, split.pids[rows], split.camids[rows], split.paths[rows], split.modality[rows], pid_names, split.name
    )


def evaluate_set(
    settings: Settings,
    tested: EvaluationSet,
    embed: Embed,
    *,
    rerank: bool | None = None,
    metric: str | None = None,
    cmc: str | None = None,
    on_embeddings: Callable[[Embeddings], object] | None = None,
) -> dict[str, dict[str, Any]]:
    """Embed a set of test images and compute the metrics of all its tests.

    Args:
      settings: the run's settings.
      tested: the images, and the tests that are made of them.
      embed: the network, compiled.
      rerank: whether to re-rank (`evaluate_embeddings`); None: as the settings say.
      metric, cmc: as for `evaluate_embeddings`; None: the protocol's.
      on_embeddings: called with the embeddings of all test images, each once, after they were checked.

    Returns:
      {setting: metrics} of all tests, as `evaluate_embeddings` gives them; with `settings.eval.flip` also 'flip'.

    Raises:
      UserError: the embeddings do not fit the protocol, or hold NaN or infinities.
    """
    rows, embeddings = _embed_set(settings, tested, embed)
    if on_embeddings is not None:
        on_embeddings(check_embeddings(embeddings))
    results = {}
    for test in tested.evaluations:
        query, gallery = (embeddings.take(np.searchsorted(rows, part)) for part in (test.query, test.gallery))
        results |= evaluate_embeddings(
            query,
            gallery,
            protocol=test.protocol,
            metric=metric,
            cmc=cmc,
            rerank=settings.eval.rerank if rerank is None else rerank,
            trial=settings.dataset.trial,
            on_device=jax.default_backend() != "cpu",
        )
    return {name: {**values, "flip": True} for name, values in results.items()} if settings.eval.flip else results


def _embed_set(settings: Settings, tested: EvaluationSet, embed: Embed) -> tuple[np.ndarray, Embeddings]:
    """The rows of all images that any test uses, each once, and their embeddings."""
    rows = np.unique(np.concatenate([part for test in tested.evaluations for part in (test.query, test.gallery)]))
    return rows, embed_rows(tested.split, rows, embed, settings.data, settings.eval.batch_size)


def embed_test_set(
    settings: Settings, variables: Variables, workdir: str | Path, *, data_dir: str | None = None
) -> tuple[Embeddings, Protocol, str]:
    """Embed all test images of a run.

    Args:
      settings: the run's settings.
      variables: {params, batch_stats} of its network.
      workdir: the run's folder.
      data_dir: where the prepared data set is now; None: where the settings say.

    Returns:
      The embeddings, the protocol of the first test, and the data set's title.

    Raises:
      UserError: the data set is not found; the message names the fix.
    """
    settings = _with_data(settings, workdir, data_dir)
    tested = datasets.open_evaluation(settings.dataset)
    _, embeddings = _embed_set(settings, tested, make_trained_embed(make_method(settings), variables, workdir))
    return embeddings, tested.evaluations[0].protocol, tested.title


def evaluate_workdir(
    workdir: Path,
    *,
    checkpoint: str = "last",
    dataset: DatasetSettings | None = None,
    data_dir: str | None = None,
    rerank: bool | None = None,
    metric: str | None = None,
    cmc: str | None = None,
) -> dict[str, dict[str, Any]]:
    """Evaluate a run on the test split of its data set, or of another one.

    Args:
      workdir: the run's folder.
      checkpoint: 'last', 'best' (kept with `eval.best`), or 'untrained' for the network before its first step, to
        compare the training with.
      dataset: another data set to test on, by its own protocol; the results then name both data sets. None: the run's.
      data_dir: where the prepared data set is now; None: where `dataset`, or else the run, says.
      rerank: as for `evaluate_embeddings`; None: as the settings say.
      metric, cmc: as for `evaluate_embeddings`; None: the protocol's.

    Returns:
      {setting: metrics}, as `evaluate_set` gives them, with 'checkpoint' and 'step', and for another data set also
      'dataset' and 'trained_on'.

    Raises:
      UserError: there is no config.json, no checkpoint or no data set; the message names the file and the fix.
    """
    run = open_run(workdir, checkpoint=checkpoint, dataset=dataset, data_dir=data_dir)
    embed = make_trained_embed(make_method(run.settings), run.variables, workdir)
    metrics = evaluate_set(run.settings, run.tested, embed, rerank=rerank, metric=metric, cmc=cmc)
    return {name: {**values, **run.about} for name, values in metrics.items()}


@dataclasses.dataclass(frozen=True)
class OpenRun:
    """A run that is ready to be tested.

    Attributes:
      settings: the run's settings, with those of the data set that it is tested on.
      variables: {params, batch_stats} of the checkpoint.
      tested: the test set.
      about: entries for the metrics: 'checkpoint', 'step', and for another data set 'dataset' and 'trained_on'.
    """

    settings: Settings
    variables: Variables
    tested: EvaluationSet
    about: dict[str, Any]


def open_run(
    workdir: Path, *, checkpoint: str = "last", dataset: DatasetSettings | None = None, data_dir: str | None = None
) -> OpenRun:
    """Open the network and the test set of a run; arguments and errors are those of `evaluate_workdir`."""
    settings = load_settings(workdir)
    trained_on = datasets.make_dataset(settings.dataset).title
    if dataset is not None:
        own = settings.dataset
        if dataset.name == own.name and dataset.trial != own.trial:
            raise UserError(
                f"{workdir}: was trained on {trained_on}, which shares identities with the data set's other splits; "
                "test it on its own split, or on another data set"
            )
        settings = dataclasses.replace(settings, dataset=dataset)
    settings = _with_data(settings, workdir, data_dir, may_prepare=dataset is not None)
    method = make_method(settings)
    if checkpoint == "untrained":
        step, variables = 0, initial_variables(method, num_ids=1)
    else:
        step, variables = load_model(workdir, checkpoint)
    tested = datasets.open_evaluation(settings.dataset)
    other = {} if dataset is None else {"dataset": tested.title, "trained_on": trained_on}
    return OpenRun(settings, variables, tested, {**other, "checkpoint": checkpoint, "step": step})


def _with_data(settings: Settings, workdir: str | Path, data_dir: str | None, *, may_prepare: bool = False) -> Settings:
    """The settings with the data set in `data_dir`, if that is given.

    Raises:
      UserError: the data set is neither prepared nor can be; or, without `may_prepare`, it would be prepared in a new
        folder.
    """
    if data_dir is not None:
        settings = replace(settings, {"dataset.data_dir": data_dir, "dataset.source": ""})
    source = settings.dataset.source
    if not datasets.is_prepared(settings.dataset) and not (source and Path(source).expanduser().is_dir()):
        title, folder = datasets.make_dataset(settings.dataset).title, Path(settings.dataset.data_dir).absolute()
        raise UserError(
            f"{workdir}: data set {title} is not prepared in {folder}; give the folder that holds it as data_dir, or "
            "prepare it with scripts/prepare_data.py"
        )
    if data_dir is None and not may_prepare:
        _check_place_of_data(settings, Path(workdir))
    return settings


def _check_place_of_data(settings: Settings, workdir: Path) -> None:
    """Raises `UserError` if config.json alone asks for data to be prepared in a new folder outside the workdir."""
    folder = Path(settings.dataset.data_dir).expanduser()
    if folder.exists() or folder.resolve().is_relative_to(workdir.resolve()):
        return
    raise UserError(
        f"{workdir}: its config.json would prepare data in {folder.absolute()}, which does not exist; give the folder "
        "for the data as data_dir, or create that one"
    )


def with_checkpoint(metrics: dict[str, dict[str, Any]], checkpoint: str, step: int) -> dict[str, dict[str, Any]]:
    """Add to the metrics of every setting which checkpoint ('last', 'best', 'untrained') of which step they are of."""
    return {name: {**values, "checkpoint": checkpoint, "step": step} for name, values in metrics.items()}
