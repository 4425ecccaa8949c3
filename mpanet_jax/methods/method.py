"""What a method is: everything in which one re-identification method differs from another, as one object.

The step, the state, the loop, checkpoints, evaluation and weights ask the method, and know none by name. A new method
subclasses `Method` in a file of its own, says what `network`, `loss_terms` and `loss_weights` are, overrides what else
it does in its own way, and gets a line in `methods/__init__.py`; docs/architecture.md walks through one.
"""

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, Protocol

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int, PRNGKeyArray, UInt8

from mpanet_jax.data.augment import augment, normalize
from mpanet_jax.data.sampling import BatchPlan
from mpanet_jax.errors import SettingsError, UserError
from mpanet_jax.models.fused import FASTER_ON, fuse, has_fused_blocks
from mpanet_jax.models.resnet import BACKBONES, Bottleneck
from mpanet_jax.optim import adam, step_decay
from mpanet_jax.settings import Settings
from mpanet_jax.weights.names import NameMap

Rows = dict[str, Array]


class Outputs(Protocol):
    """What a method's network returns, at least; its losses may need more.

    Attributes:
      embedding: float[b, d], what retrieval sees, not L2-normalised.
      logits: float[b, num_ids], whose largest entry is the identity that the network takes the image for.
    """

    @property
    def embedding(self) -> Array: ...

    @property
    def logits(self) -> Array: ...


def compute_dtype(name: str) -> np.dtype:
    """settings.dtype as a type; 'auto' is bfloat16 on accelerators and float32 on CPU.

    Raises:
      SettingsError: float64 on a TPU.
    """
    if name == "auto":
        name = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    if name == "float64" and jax.default_backend() == "tpu":
        raise SettingsError("dtype = 'float64': a TPU has no such arithmetic; use 'float32', or JAX_PLATFORMS=cpu")
    return jnp.dtype(name)


def l2_normalize(rows: Float[Array, "b d"]) -> Float[Array, "b d"]:
    """Rows of length 1."""
    return rows / jnp.linalg.norm(rows, axis=1, keepdims=True)


@dataclass(frozen=True)
class Method:
    """A method with its settings. All arrays are those of one device; see `step.py` for what is summed over devices.

    Attributes:
      settings: of the run; a subclass of `Settings` where the method has fields of its own.
      needs_modality: whether the network has to be told each image's modality.
    """

    settings: Settings

    needs_modality: ClassVar[bool] = False

    def layer_types(self) -> dict[str, Any]:
        """{dtype, param_dtype}: what the layers compute in, and what their parameters are, float32 at least."""
        dtype = compute_dtype(self.settings.dtype)
        return {"dtype": dtype, "param_dtype": jnp.promote_types(dtype, jnp.float32)}

    def matmul_precision(self) -> AbstractContextManager[None]:
        """The context in which the network is traced, so that float32 is float32 on every platform.

        A TPU multiplies float32 in one pass of bfloat16 unless it is told otherwise.
        """
        is_float32 = compute_dtype(self.settings.dtype) == jnp.float32
        return jax.default_matmul_precision("float32" if is_float32 and jax.default_backend() == "tpu" else None)

    # What every method says for itself.

    def network(self, num_ids: int, axis_name: str | None = None) -> nn.Module:
        """The plain network for `num_ids` identities.

        It is called as `network(images float[b, h, w, 3], modality int32[b], train=…)` and returns `Outputs`. With
        `axis_name`, what it computes over a batch is to be of the batch of all devices of that axis.
        """
        raise NotImplementedError

    def loss_terms(
        self, outputs: Any, rows: Rows, averages: Any, axis_name: str | None = None
    ) -> dict[str, Float[Array, ""]]:
        """This device's share of every loss term; the shares of all devices add up to the term (see `losses.py`).

        Args:
          outputs: of the network, for the rows.
          rows: `labels int32[b]` and `modality int32[b]` of the images that the network saw.
          averages: what `averaged` chose, averaged.
          axis_name: the mapped axis, None on one device.
        """
        raise NotImplementedError

    def loss_weights(self) -> Mapping[str, float]:
        """The weight of every term in the loss; a term without one is only logged."""
        raise NotImplementedError

    # What most methods share.

    def averaged(self, params: Any) -> Any:
        """The part of the parameters of which the state carries exponential averages; {} for none."""
        return {}

    def average_rate(self, steps_per_epoch: int) -> optax.Schedule:
        """The weight of the new parameters in the averages, by step; a method that averages something has to say it."""
        if type(self).averaged is not Method.averaged:
            raise NotImplementedError("a method that overrides averaged has to say average_rate too")
        return lambda step: jnp.zeros(())

    def batch_plan(self, pids: np.ndarray, modality: np.ndarray, num_ids_per_batch: int) -> BatchPlan:
        """Which images make up the batches, P = `num_ids_per_batch` identities in each, over all devices."""
        settings = self.settings
        return BatchPlan(pids, modality, num_ids_per_batch, settings.data.images_per_id, settings.seed)

    def views(
        self, key: PRNGKeyArray, images: UInt8[Array, "b h w 3"], rows: Rows, first_index: int | Int[Array, ""]
    ) -> tuple[Float[Array, "v h w 3"], Rows]:
        """The augmented, normalised images that the network sees, and their rows; several views are more rows.

        Args:
          key: this step's key, the same on every device.
          images: the resized bytes of this device's rows.
          rows: `labels` and `modality` of the images.
          first_index: the place of this device's first image in the global batch, to draw by.
        """
        dtype = compute_dtype(self.settings.dtype)
        return augment(key, images, self.settings.augment, dtype=dtype, first_index=first_index), rows

    def learning_rate(self, steps_per_epoch: int) -> optax.Schedule:
        """By step; it is logged."""
        optim = self.settings.optim
        return step_decay(optim.learning_rate, optim.milestones, optim.decay, steps_per_epoch)

    def optimizer(self, learning_rate: optax.ScalarOrSchedule) -> optax.GradientTransformation:
        """The optax chain."""
        return adam(learning_rate, self.settings.optim.weight_decay)

    def embed(
        self,
        network: nn.Module,
        variables: Any,
        images: UInt8[Array, "b h w 3"],
        modality: Int[Array, "b"] | None = None,
    ) -> Float[Array, "b d"]:
        """What retrieval sees of resized bytes: by running statistics, not L2-normalised, in float32.

        With settings.eval.flip it is the mean of the L2-normalised embeddings of an image and of its mirror image,
        normalised again.
        """

        def embedding(images: UInt8[Array, "b h w 3"]) -> Float[Array, "b d"]:
            normalised = normalize(images, compute_dtype(self.settings.dtype))
            with self.matmul_precision():
                return network.apply(variables, normalised, modality, train=False).embedding  # type: ignore[union-attr]

        if not self.settings.eval.flip:
            return embedding(images)
        return l2_normalize(l2_normalize(embedding(images)) + l2_normalize(embedding(jnp.flip(images, 2))))

    def pattern_maps(
        self,
        network: nn.Module,
        variables: Any,
        images: UInt8[Array, "b h w 3"],
        modality: Int[Array, "b"] | None = None,
    ) -> Float[Array, "b l h2 w2"]:
        """The maps by which the network weighs the places of an image, from 0 to 1, at its last stage's resolution.

        Raises:
          UserError: the method has none.
        """
        raise UserError(f"method = {self.settings.method!r}: its network makes no pattern maps; 'mpanet' does")

    def names(self) -> NameMap:
        """The names of the network's weights in PyTorch: by default those of the backbone."""
        backbone = BACKBONES[self.settings.model.backbone]
        rules = backbone.published_names
        return NameMap(rules=rules, backbone_rules=rules, describe=backbone.describe)

    # The same for all.

    @cached_property
    def _has_fused_form(self) -> bool:
        return has_fused_blocks(self.network(num_ids=1))

    def check_form(self) -> None:
        """Refuses settings.model.fused = 'on' for a network that has no fused form.

        Raises:
          SettingsError: there is none.
        """
        if self.settings.model.fused == "on" and not self._has_fused_form:
            raise SettingsError(
                f"model.fused = 'on': the network of method {self.settings.method!r} with backbone "
                f"{self.settings.model.backbone!r} has no fused form; use 'auto' or 'off'"
            )

    def build(self, num_ids: int, axis_name: str | None = None) -> nn.Module:
        """The network in the form that settings.model.fused asks for.

        Raises:
          SettingsError: the fused form is asked for and there is none.
        """
        self.check_form()
        network, model = self.network(num_ids, axis_name), self.settings.model
        # Basic blocks have no fused form, and what the other layers gain was not measured without it.
        bottlenecks = getattr(BACKBONES[model.backbone], "block", None) is Bottleneck
        faster = bottlenecks and jax.default_backend() in FASTER_ON
        return fuse(network) if model.fused == "on" or (model.fused == "auto" and faster) else network
