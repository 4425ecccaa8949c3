"""What a method is: everything in which one re-identification method differs from another, as one object.

The step, the state, the loop, checkpoints, evaluation and weights call the method and know none by name. A new method
is a subclass of `Method` in a file of its own, with a line in `methods/__init__.py`. It defines `network`, `loss_terms`
and `loss_weights`, and overrides whatever else it does differently. docs/architecture.md walks through an example.
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
from mpanet_jax.name_map import NameMap
from mpanet_jax.optim import adam, step_decay
from mpanet_jax.settings import Settings

Rows = dict[str, Array]  # of a batch's images: `labels` int32[b] and `modality` int32[b]


class Outputs(Protocol):
    """What every method's network returns; a method's losses may need more fields.

    Attributes:
      embedding: float[b, d], what retrieval compares, not L2-normalised.
      logits: float[b, num_ids]; the largest entry of a row is the identity that the network predicts.
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
    """The rows, each divided by its length."""
    return rows / jnp.linalg.norm(rows, axis=1, keepdims=True)


@dataclass(frozen=True)
class Method:
    """A method with its settings. All arrays are those of one device; `step.py` sums over devices.

    Attributes:
      settings: of the run; a subclass of `Settings` if the method has fields of its own.
      needs_modality: whether the network needs each image's modality to embed it.
    """

    settings: Settings

    needs_modality: ClassVar[bool] = False

    def layer_types(self) -> dict[str, Any]:
        """The types `dtype`, which the layers compute in, and `param_dtype`, of their parameters: float32 at least."""
        dtype = compute_dtype(self.settings.dtype)
        return {"dtype": dtype, "param_dtype": jnp.promote_types(dtype, jnp.float32)}

    def matmul_precision(self) -> AbstractContextManager[None]:
        """A context for tracing the network, in which float32 products are float32 on every platform.

        By default a TPU multiplies float32 matrices in one pass of bfloat16.
        """
        is_float32 = compute_dtype(self.settings.dtype) == jnp.float32
        return jax.default_matmul_precision("float32" if is_float32 and jax.default_backend() == "tpu" else None)

    # What every method defines.

    def network(self, num_ids: int, axis_name: str | None = None) -> nn.Module:
        """The plain network for `num_ids` identities.

        It is called as `network(images float[b, h, w, 3], modality int32[b], train=…)` and returns `Outputs`. With
        `axis_name`, whatever it computes over a batch must be computed over the batch of all devices of that axis. Its
        fields can be hashed: tuples, not lists.
        """
        raise NotImplementedError

    def loss_terms(
        self, outputs: Any, rows: Rows, averages: Any, axis_name: str | None = None
    ) -> dict[str, Float[Array, ""]]:
        """This device's share of each loss term; the shares of all devices add up to the term (see `losses.py`).

        Args:
          outputs: of the network.
          rows: `labels int32[b]` and `modality int32[b]` of the images that the network saw.
          averages: the moving averages of what `averaged` returns.
          axis_name: the mapped axis of a multi-device step, None on one device.
        """
        raise NotImplementedError

    def loss_weights(self) -> Mapping[str, float]:
        """The weight of each term in the loss; a term without a weight is only logged."""
        raise NotImplementedError

    # Defaults, which a method may override.

    def averaged(self, params: Any) -> Any:
        """The part of the parameters whose exponential moving averages the state carries; {} for none."""
        return {}

    def average_rate(self, steps_per_epoch: int) -> optax.Schedule:
        """The weight of the current parameters in their averages, by step.

        A method that overrides `averaged` must override this too.
        """
        if type(self).averaged is not Method.averaged:
            raise NotImplementedError("a method that overrides averaged must override average_rate too")
        return lambda step: jnp.zeros(())

    def batch_plan(self, pids: np.ndarray, modality: np.ndarray, num_ids_per_batch: int) -> BatchPlan:
        """Makes the plan of which images each batch has.

        Args:
          pids: int[n], identities of the training images.
          modality: int[n], 0 visible, 1 infrared.
          num_ids_per_batch: P, the number of identities in a batch over all devices.
        """
        settings = self.settings
        return BatchPlan(pids, modality, num_ids_per_batch, settings.data.images_per_id, settings.seed)

    def views(
        self, key: PRNGKeyArray, images: UInt8[Array, "b h w 3"], rows: Rows, first_index: int | Int[Array, ""]
    ) -> tuple[Float[Array, "v h w 3"], Rows]:
        """Augments and normalises a batch. Several views of an image become several rows.

        Args:
          key: of this step, the same on every device.
          images: this device's resized images.
          rows: `labels` and `modality` of the images.
          first_index: position of this device's first image in the global batch; an image's draws depend on it.

        Returns:
          The images that the network gets, and their `labels` and `modality`.
        """
        dtype = compute_dtype(self.settings.dtype)
        return augment(key, images, self.settings.augment, dtype=dtype, first_index=first_index), rows

    def learning_rate(self, steps_per_epoch: int) -> optax.Schedule:
        """The learning rate by step, which is also logged."""
        optim = self.settings.optim
        return step_decay(optim.learning_rate, optim.milestones, optim.decay, steps_per_epoch)

    def optimizer(self, learning_rate: optax.ScalarOrSchedule) -> optax.GradientTransformation:
        """The optimiser, as an optax chain."""
        return adam(learning_rate, self.settings.optim.weight_decay)

    def embed(
        self,
        network: nn.Module,
        variables: Any,
        images: UInt8[Array, "b h w 3"],
        modality: Int[Array, "b"] | None = None,
    ) -> Float[Array, "b d"]:
        """The embeddings that retrieval compares, in float32 and not L2-normalised, from resized images.

        Batch norm uses the running statistics. With settings.eval.flip an embedding is the mean of the L2-normalised
        embeddings of the image and its mirror image, L2-normalised again.
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
        """The l pattern maps of each image, from 0 to 1, at the resolution of the last stage.

        Raises:
          UserError: the method's network has no pattern maps.
        """
        raise UserError(f"method = {self.settings.method!r}: its network has no pattern maps; 'mpanet' has")

    def names(self) -> NameMap:
        """The names of the network's weights in PyTorch: by default those of the backbone."""
        backbone = BACKBONES[self.settings.model.backbone]
        rules = backbone.published_names
        return NameMap(rules=rules, backbone_rules=rules, describe=backbone.describe)

    # The same for all methods.

    @cached_property
    def _has_fused_form(self) -> bool:
        return has_fused_blocks(self.network(num_ids=1))

    def check_form(self) -> None:
        """Checks that the network has a fused form if settings.model.fused = 'on' asks for it.

        Raises:
          SettingsError: it has none.
        """
        if self.settings.model.fused == "on" and not self._has_fused_form:
            raise SettingsError(
                f"model.fused = 'on': the network of method {self.settings.method!r} with backbone "
                f"{self.settings.model.backbone!r} has no fused form; use 'auto' or 'off'"
            )

    def build(self, num_ids: int, axis_name: str | None = None) -> nn.Module:
        """Makes the network, plain or fused as settings.model.fused says.

        Raises:
          SettingsError: settings.model.fused = 'on', and the network has no fused form.
        """
        self.check_form()
        network, model = self.network(num_ids, axis_name), self.settings.model
        # Basic blocks have no fused form, and whether fusing only the other layers pays was not measured.
        bottlenecks = getattr(BACKBONES[model.backbone], "block", None) is Bottleneck
        faster = bottlenecks and jax.default_backend() in FASTER_ON
        return fuse(network) if model.fused == "on" or (model.fused == "auto" and faster) else network
