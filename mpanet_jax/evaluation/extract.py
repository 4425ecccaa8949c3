"""Computes embeddings: runs the network over batches of one shape; the last batch is padded."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Array

from mpanet_jax.background import Ahead
from mpanet_jax.device_resize import DeviceResize
from mpanet_jax.embeddings import Embeddings
from mpanet_jax.errors import ArgumentError, UserError
from mpanet_jax.methods.method import Method
from mpanet_jax.modality import UNKNOWN
from mpanet_jax.parallel import local_devices
from mpanet_jax.progress import closing, track
from mpanet_jax.settings import DataSettings
from mpanet_jax.weights.convert import template_of
from mpanet_jax.weights.names import Variables

# (images uint8[b, h, w, 3], modality int32[b] or None) → embeddings float[b, d] on the device
Embed = Callable[[Any, Any], Array]
Batch = dict[str, np.ndarray]

# A number of identities that is the length of no other axis: arrays that have such an axis are classifiers.
MARK = 1_000_003
RESULTS_AHEAD = 2  # batches that are dispatched before a result is waited for


def make_embed(method: Method, num_ids: int, function: Callable[..., Array] | None = None) -> Callable[[Any], Embed]:
    """Make the function that turns variables into a compiled `Embed`.

    The `Embed` splits the rows among all devices of this process, so there must be a multiple of their number.

    Args:
      method: the method whose network is run.
      num_ids: the number of identities that the network's classifiers tell apart.
      function: `(network, variables, images, modality) → rows`, computed instead of `method.embed`.

    Returns:
      {params, batch_stats} → `Embed`. The `Embed` raises `ArgumentError` if the method needs the modality and that of
      some image is unknown.
    """
    devices, network, function = local_devices(), method.build(num_ids), function or method.embed
    mapped = devices.map_rows(lambda v, rows: function(network, v, rows["images"], rows.get("modality")))

    def with_variables(variables: Any) -> Embed:
        variables = devices.replicate({name: variables[name] for name in ("params", "batch_stats")})

        def embed(images: Any, modality: Any = None) -> jax.Array:
            rows = {"images": images}
            if method.needs_modality:
                if modality is None or np.any(modality == UNKNOWN):
                    raise ArgumentError(
                        "modality",
                        f"of some images is not known, and method {method.settings.method!r} needs it: "
                        "say what they are, or list them in an images.csv",
                    )
                rows["modality"] = modality
            return mapped(variables, rows)

        return embed

    return with_variables


def whole_variables(method: Method, variables: Variables, source: str | Path) -> tuple[int, Variables]:
    """Add the classifiers that a trained network's variables lack, as zeros; embeddings do not need them.

    Args:
      method: the method of the network.
      variables: {params, batch_stats}, with or without the classifiers.
      source: what an error calls the variables.

    Returns:
      The number of identities that the classifiers tell apart, and the whole {params, batch_stats}.

    Raises:
      UserError: the variables are of a backbone alone, which has no embedding.
    """
    names = method.names()
    given: dict[tuple[str, ...], Any] = flatten_dict(
        {name: variables[name] for name in ("params", "batch_stats") if name in variables}
    )
    if all(map(names.is_backbone, given)):
        raise UserError(
            f"{source}: these weights are a bare backbone's, and an embedding needs those of a trained network; "
            "to train one from these, set init_from in its settings"
        )
    params: dict[tuple[str, ...], Any] = flatten_dict({"params": template_of(method, MARK)["params"]})
    grow = {path: leaf.shape.index(MARK) for path, leaf in params.items() if MARK in leaf.shape}
    num_ids = next((given[path].shape[axis] for path, axis in grow.items() if path in given), 1)
    zeros = {
        path: np.zeros([num_ids if length == MARK else length for length in leaf.shape], leaf.dtype)
        for path, leaf in params.items()
        if path not in given and (path in grow or names.is_classifier(names.name(path)))
    }
    return num_ids, unflatten_dict({**zeros, **given})


def make_trained_embed(method: Method, variables: Variables, source: str | Path) -> Embed:
    """The `Embed` of a trained network; arguments and errors are those of `whole_variables`."""
    num_ids, variables = whole_variables(method, variables, source)
    return make_embed(method, num_ids)(variables)


def run_batches(function: Embed, batches: Iterable[Batch]) -> Iterator[tuple[Batch, np.ndarray]]:
    """Run `function` over eval batches; yields each batch with its rows, float32, without the padding.

    Rows are padding where the batch's `mask` is False.
    """
    # A result travels to the host while the device computes the next ones: it never waits.
    on_the_way: deque[tuple[Batch, Array]] = deque()

    def arrived() -> tuple[Batch, np.ndarray]:
        batch, result = on_the_way.popleft()
        rows = np.asarray(result, np.float32)
        return batch, rows if batch["mask"].all() else rows[batch["mask"]]

    with closing(batches):
        for batch in batches:
            result = function(batch["images"], batch["modality"])
            if isinstance(result, jax.Array):
                result.copy_to_host_async()
            on_the_way.append((batch, result))
            if len(on_the_way) > RESULTS_AHEAD:
                yield arrived()
    while on_the_way:
        yield arrived()


def track_batches(batches: Iterable[Batch], total: int, *, active: bool = True) -> Iterator[Batch]:
    """The same eval batches, with a progress bar that counts their `total` images; `active` as in `progress.Bar`."""
    return track(batches, "embedding", total, size=lambda batch: int(batch["mask"].sum()), active=active)


def with_images(batches: Iterable[Batch], data: DataSettings) -> Iterator[dict[str, Any]]:
    """The same eval batches, with the images that were sent decoded resized on this process's devices, one ahead."""
    resize = DeviceResize.of(data, local_devices())
    with closing(batches), Ahead(map(resize, batches)) as ready:
        yield from ready


def extract_embeddings(
    embed: Embed,
    batches: Iterable[Batch],
    paths: np.ndarray,
    num_images: int,
) -> Embeddings:
    """Run `embed` over eval batches and collect the embeddings.

    Args:
      embed: turns resized bytes into embeddings; it is compiled once, since all batches have the same shape.
      batches: eval batches (docs/method.md); rows whose `mask` is False are padding and are dropped.
      paths: str[N], the paths of the whole split, which the batches' `index` points into.
      num_images: how many images the batches have.

    Returns:
      One row for each image, in the order of the batches; features are float32 and not normalised.
    """
    features, done = None, 0
    columns = {name: [] for name in ("pids", "camids", "index", "modality")}
    for batch, rows in run_batches(embed, batches):
        if features is None:
            features = np.empty((num_images, rows.shape[1]), np.float32)
        features[done : done + len(rows)] = rows
        done += len(rows)
        for name, column in columns.items():
            column.append(batch[name][batch["mask"]])
    pids, camids, index, modality = map(np.concatenate, columns.values())
    assert features is not None and done == num_images, f"{done} of {num_images} images came"
    return Embeddings(features, pids, camids, paths[index], modality)
