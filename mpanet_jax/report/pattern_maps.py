"""Computes which parts of an image each pattern attends to: Grad-CAM on P_k = M_k ⊙ F, as in the paper's figure 3."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, UInt8
from PIL import Image

from mpanet_jax.data.augment import normalize
from mpanet_jax.data.decode import resized
from mpanet_jax.errors import UserError
from mpanet_jax.methods.method import compute_dtype
from mpanet_jax.model import NUM_IDS, Model
from mpanet_jax.models.attention import PatternAlignment
from mpanet_jax.row_norms import l2_normalize

_BATCH = 8  # an image's gradients are as large as l feature maps: 9 MiB at 384×128


def grad_cam(
    model: Model, images: Sequence[Image.Image], targets: Float32[np.ndarray, "n d"]
) -> Float32[np.ndarray, "n l h w"]:
    """Compute Grad-CAM of every pattern of every image, on the feature map P_k = M_k ⊙ F that eq. 5 pools.

    Grad-CAM (Selvaraju et al., ICCV 2017) explains a score S by a feature map. The gradients of S, averaged over the
    places i, say how much each channel c counts, and the map L_k shows where the channels that raise S are strong:

        α_kc = mean over i of ∂S/∂P_k[i, c]        L_k[i] = ReLU(Σ_c α_kc P_k[i, c]).

    The paper does not name its score. Here S is what retrieval uses: the cosine similarity of the image's embedding g
    and a target t, usually the mean embedding of the same identity's images in the other modality (`targets_of`). So a
    place is bright if it makes the image more similar to how the other camera sees this person. Each P_k is a variable
    of its own: the other paths from F to the embedding, through the other patterns and the global feature, are held
    constant. The embedding is that of the image itself, without its mirror image, whatever settings.eval.flip is.

    If the target is the image's own embedding, the cosine is 1, its maximum, and its gradient is 0. Then S is g·t/‖t‖,
    the length of g along its own direction: the same without the division by ‖g‖.

    Args:
      model: a network with PAM.
      images: n images of any size; they are resized as in training.
      targets: one target for each image, of any length greater than 0. A row of NaN means the image's own embedding.

    Returns:
      L for the l patterns of each image, at the resolution of F; not negative, and not scaled to 1.

    Raises:
      UserError: the network makes no pattern maps, or there is not one target for each image.
    """
    method = model.method
    # Raises an error that names the problem if the network has no PAM.
    shape = (1, model.settings.data.height, model.settings.data.width, 3)
    jax.eval_shape(partial(method.pattern_maps, model.network), model.variables, jax.ShapeDtypeStruct(shape, jnp.uint8))
    network = method.network(NUM_IDS)  # the plain form: in the fused one P_k cannot be changed
    pixels = np.stack([resized(image, model.settings.data) for image in images])
    targets = np.asarray(targets, np.float32)
    if not len(pixels) == len(targets):
        raise UserError(f"targets: {len(targets)} rows for {len(pixels)} images; expected one for each")
    function = jax.jit(partial(_grad_cam, network, compute_dtype(model.settings.dtype)))
    size = min(_BATCH, len(pixels))
    parts = []
    for start in range(0, len(pixels), size):
        rows = np.minimum(np.arange(start, start + size), len(pixels) - 1)  # pads the last batch
        parts.append(np.asarray(function(model.variables, pixels[rows], targets[rows]), np.float32))
    return np.concatenate(parts)[: len(pixels)]


def _grad_cam(
    network: nn.Module, dtype: Any, variables: Any, images: UInt8[Array, "b h w 3"], targets: Float[Array, "b d"]
) -> Float[Array, "b l h2 w2"]:
    normalised = normalize(images, dtype)

    def embed(change: Array | None = None) -> tuple[Float[Array, "b d"], Float[Array, "b l h2 w2 c"]]:
        """The embedding with `change` added to all P_k, and the P_k without it."""
        seen = []

        def pool_changed(next_function: Any, args: Any, kwargs: Any, context: Any) -> Any:
            """PAM's result, with eq. 5 computed from the changed P_k."""
            result = next_function(*args, **kwargs)
            if not isinstance(context.module, PatternAlignment) or context.method_name != "__call__":
                return result
            maps = result[1]
            feature_map = args[0].astype(maps.dtype)
            by_pattern = maps.reshape(*feature_map.shape[:3], -1).transpose(0, 3, 1, 2)
            seen.append(by_pattern[..., None] * feature_map[:, None])
            changed = seen[0] if change is None else seen[0] + change
            pooled = jnp.concatenate([changed.mean((2, 3)), feature_map.mean((1, 2))[:, None]], axis=1)
            return pooled.reshape(len(pooled), -1), maps

        with nn.intercept_methods(pool_changed):
            outputs: Any = network.apply(variables, normalised, train=False)
        return outputs.embedding, seen[0]

    own, patterns = embed()
    itself = jnp.isnan(targets).any(1)
    direction = jnp.where(itself[:, None], own, targets)
    direction /= jnp.linalg.norm(direction, axis=1, keepdims=True)

    def total_score(change: Array) -> Array:
        embedding, _ = embed(change)
        along = (embedding * direction).sum(1)
        # A score depends on its own image's change only, so the gradient of the sum holds the gradient of each score.
        return jnp.where(itself, along, along / jnp.linalg.norm(embedding, axis=1)).sum()

    gradient = jax.grad(total_score)(jnp.zeros_like(patterns))
    return jax.nn.relu((gradient.mean((2, 3), keepdims=True) * patterns).sum(-1))


def targets_of(
    pids: np.ndarray, modality: np.ndarray, features: Float32[np.ndarray, "n d"], rows: np.ndarray
) -> Float32[np.ndarray, "r d"]:
    """The targets of `grad_cam` for images: the mean unit embedding of the same identity in the other modality.

    Args:
      pids, modality: int[n] of all images; -1 is unknown.
      features: their embeddings, of any length.
      rows: int[r], the images whose targets are wanted.

    Returns:
      One target for each of `rows`; NaN, which means the image's own embedding, if the identity has no image in the
      other modality, or identity or modality is unknown.
    """
    unit = l2_normalize(features)
    found = np.full((len(rows), features.shape[1]), np.nan, np.float32)
    for place, row in enumerate(rows):
        if pids[row] < 0 or modality[row] < 0:
            continue
        others = (pids == pids[row]) & (modality >= 0) & (modality != modality[row])
        if others.any():
            found[place] = unit[others].mean(0)
    return found
