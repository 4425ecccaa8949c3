"""Fast forms of the plain layers: the same parameters, running statistics and numbers, with less memory traffic.

`fuse(network)` returns a network that computes every layer in its fused form, if there is one. The plain layers do not
know about this: flax intercepts their calls. Custom gradients, optimisation barriers and work that overlaps with sums
over devices are in this package only. docs/performance.md gives the reasons for each form, with measurements.
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.linen.module import InterceptorContext

from mpanet_jax.models.agw import NonLocalBlock
from mpanet_jax.models.attention import ModalityAlleviation, PatternAlignment
from mpanet_jax.models.fused.attention import fused_mam, fused_pam
from mpanet_jax.models.fused.classifier import fused_classifier
from mpanet_jax.models.fused.non_local import fused_non_local
from mpanet_jax.models.fused.normalization import fused_batch_norm
from mpanet_jax.models.fused.resnet import fused_bottleneck, fused_stem
from mpanet_jax.models.layers import BatchNorm, Classifier
from mpanet_jax.models.resnet import Bottleneck, Stem

# Plain layer → fused form, a function that takes the layer and the arguments of its __call__.
FUSED_FORMS: dict[type[nn.Module], Callable[..., Any]] = {
    BatchNorm: fused_batch_norm,
    Bottleneck: fused_bottleneck,
    Classifier: fused_classifier,
    ModalityAlleviation: fused_mam,
    NonLocalBlock: fused_non_local,
    PatternAlignment: fused_pam,
    Stem: fused_stem,
}
# The platforms on which the fused network was measured to be faster (docs/performance.md).
FASTER_ON = ("cpu", "gpu")


class Fused(nn.Module):
    """A network that computes its layers in their fused forms; its variables are those of the plain network."""

    network: nn.Module

    def setup(self):
        nn.share_scope(self, self.network)

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        def call(plain: Callable[..., Any], args: Any, kwargs: Any, context: InterceptorContext) -> Any:
            form = FUSED_FORMS.get(type(context.module)) if context.method_name == "__call__" else None
            return plain(*args, **kwargs) if form is None else form(context.module, *args, **kwargs)

        with nn.intercept_methods(call):
            return self.network(*arguments, **options)


def fuse(network: nn.Module) -> nn.Module:
    """A network with the variables and results of `network`, which computes every layer in its fused form, if any."""
    return Fused(network)


class _FoundError(Exception):
    """Raised to end a trace: what it looked for is there."""


def has_fused_blocks(network: nn.Module) -> bool:
    """Whether the network has bottlenecks: most of the speed that `fuse` gains comes from their fused form."""

    def find(plain: Callable[..., Any], args: Any, kwargs: Any, context: InterceptorContext) -> Any:
        if type(context.module) is Bottleneck:
            raise _FoundError
        return plain(*args, **kwargs)

    images, modality = jax.ShapeDtypeStruct((2, 64, 64, 3), jnp.float32), jax.ShapeDtypeStruct((2,), jnp.int32)
    try:
        with nn.intercept_methods(find):
            jax.eval_shape(lambda x, m: network.init(jax.random.key(0), x, m, train=False), images, modality)
    except _FoundError:  # tracing the rest would take most of a second
        return True
    return False
