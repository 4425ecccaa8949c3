"""Evaluation of a trained run: restore the model, embed the test split, apply the data set's protocol."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from mpanet_jax import datasets
from mpanet_jax.checkpoint import load_model
from mpanet_jax.data.pipeline import split_batches
from mpanet_jax.datasets.schema import INFRARED, VISIBLE, Split
from mpanet_jax.errors import UserError
from mpanet_jax.evaluation.evaluate import evaluate_embeddings
from mpanet_jax.evaluation.extract import Embed, extract_embeddings
from mpanet_jax.evaluation.protocols import Embeddings
from mpanet_jax.methods import make_method
from mpanet_jax.methods.method import Method
from mpanet_jax.parallel import local_devices
from mpanet_jax.processes import gather_shares, share_of_process
from mpanet_jax.run_files import load_settings
from mpanet_jax.settings import Settings, replace
from mpanet_jax.weights.convert import initial_variables, template_of
from mpanet_jax.weights.names import Variables, number_of_ids


def make_embed(method: Method, num_ids: int) -> Callable[[Any], Embed]:
    """variables {params, batch_stats} → `Embed`, compiled, on all devices of this process, which divide the rows."""
    devices, network = local_devices(), method.build(num_ids)
    function = devices.map_rows(lambda v, rows: method.embed(network, v, rows["images"], rows.get("modality")))

    def with_variables(variables: Any) -> Embed:
        variables = devices.replicate({name: variables[name] for name in ("params", "batch_stats")})

        def embed(images: Any, modality: Any = None) -> jax.Array:
            rows = {"images": images}
            if method.needs_modality:
                if modality is None:
                    raise UserError(f"method {method.settings.method!r} needs the modality of each image it embeds")
                rows["modality"] = modality
            return function(variables, rows)

        return embed

    return with_variables


def embed_of(method: Method, variables: Variables, source: str | Path) -> Embed:
    """`Embed` of a trained network, whose classifiers may have been left out.

    `source` is what an error calls the variables.

    Raises:
      UserError: the variables are of a backbone alone, which has no embedding.
    """
    names, num_ids = method.names(), number_of_ids(variables, method.names())
    given = flatten_dict(variables)
    if all(map(names.is_backbone, given)):
        raise UserError(
            f"{source}: these weights are a bare backbone's, and an embedding needs those of a trained network; "
            "to train one from these, set config.init_from"
        )
    # Embeddings need no classifiers: those that were left out become zeros.
    expected: dict[tuple[str, ...], Any] = flatten_dict(template_of(method, num_ids))
    zeros = {
        path: np.zeros(leaf.shape, leaf.dtype)
        for path, leaf in expected.items()
        if names.is_classifier(names.name(path))
    }
    return make_embed(method, num_ids)(unflatten_dict({**zeros, **given}))


def embed_split(settings: Settings, split: Split, embed: Embed) -> tuple[Embeddings, Embeddings]:
    """Embeddings of a test split's (visible, infrared) images. Of several processes each embeds its share of them."""
    # Every device gets the same number of rows.
    num_devices = jax.local_device_count()
    batch_size = -(-settings.eval.batch_size // num_devices) * num_devices
    by_modality = []
    for modality in (VISIBLE, INFRARED):
        images = (split.modality == modality).nonzero()[0]
        batches = split_batches(split, share_of_process(images), settings.data, batch_size)
        share = extract_embeddings(embed, batches, split.paths)
        features = gather_shares(share.features, len(images), "the embeddings of the test set")
        by_modality.append(Embeddings(features, split.pids[images], split.camids[images], split.paths[images]))
    return by_modality[0], by_modality[1]


def evaluate_split(
    settings: Settings,
    visible: Embeddings,
    infrared: Embeddings,
    *,
    rerank: bool | None = None,
    metric: str | None = None,
    cmc: str | None = None,
) -> dict[str, dict[str, Any]]:
    """The metrics of the data set's protocol; None leaves an option at the protocol's (or the settings') choice."""
    name = settings.dataset.name
    permutation = datasets.permutation_file(settings.dataset.data_dir) if name == "sysu_mm01" else None
    return evaluate_embeddings(
        infrared,
        visible,
        protocol=name,
        permutation=permutation,
        metric=metric,
        cmc=cmc,
        rerank=settings.eval.rerank if rerank is None else rerank,
        trial=settings.dataset.trial,
        on_device=jax.default_backend() != "cpu",
    )


def evaluate_workdir(
    workdir: Path,
    *,
    checkpoint: str = "last",
    data_dir: str | None = None,
    rerank: bool | None = None,
    metric: str | None = None,
    cmc: str | None = None,
) -> dict[str, dict[str, Any]]:
    """Metrics of a run on its data set's test split.

    Args:
      workdir: the run's folder.
      checkpoint: 'last', 'best' (kept with config.eval.best; chosen by the test set), or 'untrained' for the network
        before its first step, which training is to be held against.
      data_dir: where the prepared data set is now; None: where the run had it.
      rerank, metric, cmc: as `evaluate_embeddings`; None leaves them to the protocol and the config.

    Raises:
      UserError: no config.json, no checkpoint, or no data set; the message names the file and the fix.
    """
    settings = load_settings(workdir)
    if data_dir is not None:
        settings = replace(settings, {"dataset.data_dir": data_dir, "dataset.source": ""})
    dataset = settings.dataset
    prepared = datasets.is_prepared(dataset.name, dataset.data_dir, trial=dataset.trial or 1)
    if not prepared and not (dataset.source and Path(dataset.source).expanduser().is_dir()):
        raise UserError(
            f"{workdir}: its data set {dataset.name} is not prepared in {Path(dataset.data_dir).absolute()}; "
            "name the folder that was config.dataset.data_dir with --data_dir"
        )
    method = make_method(settings)
    if checkpoint == "untrained":
        step, variables = 0, initial_variables(method, num_ids=1)
    else:
        step, variables = load_model(workdir, checkpoint)
    split = datasets.open_split(dataset, "test")
    embed = embed_of(method, variables, workdir)
    metrics = evaluate_split(settings, *embed_split(settings, split, embed), rerank=rerank, metric=metric, cmc=cmc)
    return of_checkpoint(metrics, checkpoint, step)


def of_checkpoint(metrics: dict[str, dict[str, Any]], checkpoint: str, step: int) -> dict[str, dict[str, Any]]:
    """The metrics with the checkpoint that they are of, 'last', 'best' or 'untrained', and its step."""
    return {name: {**values, "checkpoint": checkpoint, "step": step} for name, values in metrics.items()}
