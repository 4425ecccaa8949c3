"""Evaluation of a trained run: restore the model, embed the test split, apply the data set's protocol."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Float, UInt8
from ml_collections import ConfigDict

from mpanet_jax import datasets
from mpanet_jax.checkpoint import load_model
from mpanet_jax.data.pipeline import eval_batches
from mpanet_jax.datasets.schema import INFRARED, VISIBLE, Split
from mpanet_jax.errors import UserError
from mpanet_jax.evaluation.evaluate import evaluate_embeddings
from mpanet_jax.evaluation.extract import extract_embeddings
from mpanet_jax.evaluation.protocols import Embeddings
from mpanet_jax.experiment import initial_variables, load_config, load_split, make_model
from mpanet_jax.models.mpanet import MPANet
from mpanet_jax.parallel import local_devices
from mpanet_jax.processes import gather_shares, share_of_process
from mpanet_jax.step import embed_step

# Where the metrics of each `checkpoint` of `evaluate_workdir` are written, below the workdir.
METRICS_FILES = {"last": "metrics.json", "best": "metrics_best.json", "untrained": "metrics_untrained.json"}

Embed = Callable[[UInt8[np.ndarray, "b h w 3"]], Float[Array, "b d"]]


def make_embed(model: MPANet) -> Callable[[dict[str, Any]], Embed]:
    """variables {params, batch_stats} → (resized bytes → embeddings), compiled, on all devices of this process."""
    devices = local_devices()
    embed = devices.map_rows(lambda variables, images: embed_step(variables, images, model=model))
    return lambda variables: partial(embed, devices.replicate(variables))


def embed_split(config: ConfigDict, split: Split, embed: Embed) -> tuple[Embeddings, Embeddings]:
    """Embeddings of a test split's (visible, infrared) images. Of several processes each embeds its share of them."""
    # Every device gets the same number of rows.
    num_devices = jax.local_device_count()
    batch_size = -(-config.eval.batch_size // num_devices) * num_devices
    by_modality = []
    for modality in (VISIBLE, INFRARED):
        images = (split.modality == modality).nonzero()[0]
        batches = eval_batches(
            split,
            share_of_process(images),
            height=config.data.height,
            width=config.data.width,
            batch_size=batch_size,
        )
        share = extract_embeddings(embed, batches, split.paths)
        features = gather_shares(share.features, len(images), "the embeddings of the test set")
        by_modality.append(Embeddings(features, split.pids[images], split.camids[images], split.paths[images]))
    return by_modality[0], by_modality[1]


def evaluate_split(
    config: ConfigDict,
    visible: Embeddings,
    infrared: Embeddings,
    *,
    rerank: bool | None = None,
    metric: str | None = None,
    cmc: str | None = None,
) -> dict[str, dict[str, Any]]:
    """The metrics of the data set's protocol; None leaves an option at the protocol's (or the config's) choice."""
    name = config.dataset.name
    permutation = datasets.permutation_file(config.dataset.data_dir) if name == "sysu_mm01" else None
    return evaluate_embeddings(
        infrared,
        visible,
        protocol=name,
        permutation=permutation,
        metric=metric,
        cmc=cmc,
        rerank=config.eval.rerank if rerank is None else rerank,
        trial=config.dataset.trial if name == "regdb" else None,
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
    config = load_config(workdir)
    dataset = config.dataset
    if data_dir is not None:
        dataset.data_dir, dataset.source = data_dir, ""
    prepared = datasets.is_prepared(dataset.name, dataset.data_dir, trial=dataset.trial)
    if not prepared and not (dataset.source and Path(dataset.source).expanduser().is_dir()):
        raise UserError(
            f"{workdir}: its data set {dataset.name} is not prepared in {Path(dataset.data_dir).absolute()}; "
            "name the folder that was config.dataset.data_dir with --data_dir"
        )
    if checkpoint == "untrained":
        step, variables = 0, initial_variables(config, num_ids=1)
    else:
        step, variables = load_model(workdir, checkpoint)
    split = load_split(config, "test")
    model = make_model(config, num_ids=variables["params"]["classifier"].shape[-1])
    variables = {name: variables[name] for name in ("params", "batch_stats")}
    visible, infrared = embed_split(config, split, make_embed(model)(variables))
    metrics = evaluate_split(config, visible, infrared, rerank=rerank, metric=metric, cmc=cmc)
    return {name: {**values, "checkpoint": checkpoint, "step": step} for name, values in metrics.items()}
