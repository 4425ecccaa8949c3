"""The five losses of MPANet, eq. 7–13.

Every function returns *this device's share* of the loss: every denominator is global, so the shares of all devices of
`axis_name` add up to the loss of the global batch. On one device (`axis_name=None`) the share is the loss. The sum of
the shares' gradients over the devices (`step.total_gradients`) is the gradient of the global loss.

A batch holds B = P·K images; image b belongs to identity slot b // K (docs/method.md, "A train batch").
"""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from mpanet_jax.modality import VISIBLE


def _total(values: Array, axis_name: str | None) -> Array:
    return values.sum() if axis_name is None else lax.psum(values.sum(), axis_name)


def batch_mean(values: Float[Array, "b"], axis_name: str | None) -> Float[Array, ""]:
    """This device's share of the mean over the images of all devices."""
    return values.sum() / _total(jnp.ones_like(values), axis_name)


def _modality_means(values: Float[Array, "b"], modality: Int[Array, "b"], axis_name: str | None) -> Float[Array, ""]:
    """The mean over the visible images plus the mean over the infrared ones."""
    visible = (modality == VISIBLE).astype(values.dtype)
    infrared = 1 - visible
    return (values * visible).sum() / _total(visible, axis_name) + (values * infrared).sum() / _total(
        infrared, axis_name
    )


def _cross_entropy(logits: Float[Array, "b n"], labels: Int[Array, "b"]) -> Float[Array, "b"]:
    return -jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], axis=1)[:, 0]


def _of_own_modality(modality: Int[Array, "b"], visible: Array, infrared: Array) -> Float[Array, "b n"]:
    return jnp.where(modality[:, None] == VISIBLE, visible, infrared)


def identity_loss(
    logits: Float[Array, "b n"],
    labels: Int[Array, "b"],
    modality: Int[Array, "b"],
    *,
    per_modality: bool = True,
    axis_name: str | None = None,
) -> Float[Array, ""]:
    """L_id, eq. 12: cross-entropy; the mean over visible plus the mean over infrared images.

    Without `per_modality` it is one mean over all images.
    """
    values = _cross_entropy(logits, labels)
    return _modality_means(values, modality, axis_name) if per_modality else batch_mean(values, axis_name)


def modality_identity_loss(
    visible_logits: Float[Array, "b n"],
    infrared_logits: Float[Array, "b n"],
    labels: Int[Array, "b"],
    modality: Int[Array, "b"],
    *,
    axis_name: str | None = None,
) -> Float[Array, ""]:
    """L_sid, eq. 8: cross-entropy of each image under the classifier of its own modality; averaged as L_id."""
    own = _of_own_modality(modality, visible_logits, infrared_logits)
    return _modality_means(_cross_entropy(own, labels), modality, axis_name)


def separation_loss(maps: Float[Array, "b positions l"], *, axis_name: str | None = None) -> Float[Array, ""]:
    """L_sep, eq. 7: the batch mean of Σ_{i<j} (MᵀM)_ij · 2/(l(l−1)) over each image's l pattern maps; 0 if l < 2."""
    num_patterns = maps.shape[-1]
    if num_patterns < 2:
        return jnp.zeros((), maps.dtype)
    overlaps = jnp.einsum("bni,bnj->bij", maps, maps, precision=lax.Precision.HIGHEST)
    pairs = jnp.triu(jnp.ones((num_patterns, num_patterns), maps.dtype), k=1)
    per_image = (overlaps * pairs).sum((1, 2)) * 2 / (num_patterns * (num_patterns - 1))
    return batch_mean(per_image, axis_name)


def _norm(x: Float[Array, "... d"]) -> Float[Array, "..."]:
    """‖x‖₂ over the last axis, with gradient 0 (not NaN) at 0."""
    squared = (x * x).sum(-1)
    is_zero = squared == 0
    return jnp.where(is_zero, 0, jnp.sqrt(jnp.where(is_zero, 1, squared)))


def center_cluster_loss(
    features: Float[Array, "b d"], *, images_per_id: int, margin: float, axis_name: str | None = None
) -> Float[Array, ""]:
    """L_cc, eq. 13, of the features before the neck; `margin` is ρ.

    The first term is the mean L2 distance of an image to its identity's centre h, the second the mean of
    [ρ − ‖h_k − h_j‖]₊ over the P(P−1)/2 pairs of identities. The K images of an identity are on one device; the centres
    of all devices are gathered for the pairs.
    """
    slots = features.reshape(-1, images_per_id, features.shape[-1])
    centers = slots.mean(1)
    pull = batch_mean(_norm(slots - centers[:, None]).reshape(-1), axis_name)
    if axis_name is None:
        others, first = centers, 0
    else:
        others = lax.all_gather(centers, axis_name, tiled=True)
        first = lax.axis_index(axis_name) * len(centers)
    num_ids = len(others)
    if num_ids < 2:
        return pull
    distances = _norm(centers[:, None] - others[None])
    # Each pair once: k < j in the global numbering of the slots.
    once = (first + jnp.arange(len(centers)))[:, None] < jnp.arange(num_ids)
    push = jnp.where(once, jax.nn.relu(margin - distances), 0).sum() * 2 / (num_ids * (num_ids - 1))
    return pull + push


def mutual_mean_loss(
    visible_logits: Float[Array, "b n"],
    infrared_logits: Float[Array, "b n"],
    mean_visible_logits: Float[Array, "b n"],
    mean_infrared_logits: Float[Array, "b n"],
    modality: Int[Array, "b"],
    *,
    student_first: bool = False,
    axis_name: str | None = None,
) -> Float[Array, ""]:
    """L_MM, eq. 10: the mean classifier of the *other* modality teaches the classifier of the image's own modality.

    It is KL(mean ‖ own), averaged as L_id. With `student_first` it is the published program's KL(own ‖ mean), in one
    mean over the batch. No gradient flows through the mean classifiers' prediction.
    """
    own = jax.nn.log_softmax(_of_own_modality(modality, visible_logits, infrared_logits))
    other = _of_own_modality(modality, mean_infrared_logits, mean_visible_logits)
    mean = jax.nn.log_softmax(lax.stop_gradient(other))
    if student_first:
        return batch_mean((jnp.exp(own) * (own - mean)).sum(-1), axis_name)
    return _modality_means((jnp.exp(mean) * (mean - own)).sum(-1), modality, axis_name)
