"""torchvision's ResNet-18, 34, 50, 101 and 152 (v1.5: the stride is in the 3×3 convolution), for images as NHWC.

Padding is half the kernel's size on every side, as in torchvision; flax's "SAME" would pad otherwise. As is usual in
person re-identification, stage 4 has stride 1 and keeps the resolution of stage 3.

All modules have the fields `dtype`, which their convolutions compute in, `param_dtype`, of their parameters, and
`axis_name`, the mapped axis of a multi-device step (None on one device): batch norm takes its statistics over it.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar, Protocol, runtime_checkable

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from mpanet_jax.errors import UserError
from mpanet_jax.models.layers import BatchNorm, kaiming_fan_out

# Rules that turn a Flax path into torchvision's name, with "/" in place of "."; all are applied, in this order.
TORCHVISION_NAMES = (
    (r"\bstem/", ""),
    (r"\bstage(\d)/block(\d+)/", r"layer\1/\2/"),
    (r"/downsample_conv/", "/downsample/0/"),
    (r"/downsample_bn/", "/downsample/1/"),
)


def convolution(features: int, size: int, stride: int = 1, **options: Any) -> nn.Conv:
    """A size × size convolution without bias, padded and initialised as in torchvision."""
    return nn.Conv(
        features, (size, size), stride, padding=size // 2, use_bias=False, kernel_init=kaiming_fan_out, **options
    )


class Stem(nn.Module):
    """7×7 convolution with stride 2, batch norm, ReLU, 3×3 max-pool with stride 2.

    The output has a quarter of the images' height and width, and `width` channels.
    """

    width: int = 64
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32
    axis_name: str | None = None

    @nn.compact
    def __call__(self, images: Float[Array, "b h w 3"], *, train: bool) -> Float[Array, "b h4 w4 c"]:
        x = convolution(self.width, 7, 2, dtype=self.dtype, param_dtype=self.param_dtype, name="conv1")(images)
        x = BatchNorm(axis_name=self.axis_name, param_dtype=self.param_dtype, name="bn1")(x, train=train)
        # flax does not annotate `padding`, so a type checker expects a string, like the default.
        return nn.max_pool(nn.relu(x), (3, 3), (2, 2), padding=((1, 1), (1, 1)))  # pyright: ignore[reportArgumentType]


class BasicBlock(nn.Module):
    """Two 3×3 convolutions with a shortcut, which a 1×1 convolution projects where the shape changes.

    Attributes:
      width: channels of both convolutions.
      stride: of the first convolution and of the projected shortcut.
    """

    expansion: ClassVar[int] = 1  # output channels / width

    width: int
    stride: int = 1
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32
    axis_name: str | None = None

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"], *, train: bool) -> Float[Array, "b h2 w2 c2"]:
        conv = partial(convolution, dtype=self.dtype, param_dtype=self.param_dtype)
        norm = partial(BatchNorm, axis_name=self.axis_name, param_dtype=self.param_dtype)
        shortcut = x
        if self.stride != 1 or x.shape[-1] != self.width:
            shortcut = conv(self.width, 1, self.stride, name="downsample_conv")(x)
            shortcut = norm(name="downsample_bn")(shortcut, train=train)
        y = conv(self.width, 3, self.stride, name="conv1")(x)
        y = nn.relu(norm(name="bn1")(y, train=train))
        y = conv(self.width, 3, name="conv2")(y)
        y = norm(name="bn2")(y, train=train)
        return nn.relu(y + shortcut)


class Bottleneck(nn.Module):
    """1×1, 3×3 and 1×1 convolution with a shortcut, which a 1×1 convolution projects where the shape changes.

    Attributes:
      width: channels of the first two convolutions; the output has 4·width.
      stride: of the 3×3 convolution and of the projected shortcut.
    """

    expansion: ClassVar[int] = 4

    width: int
    stride: int = 1
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32
    axis_name: str | None = None

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"], *, train: bool) -> Float[Array, "b h2 w2 c2"]:
        conv = partial(convolution, dtype=self.dtype, param_dtype=self.param_dtype)
        norm = partial(BatchNorm, axis_name=self.axis_name, param_dtype=self.param_dtype)
        out = self.expansion * self.width
        shortcut = x
        if self.stride != 1 or x.shape[-1] != out:
            shortcut = conv(out, 1, self.stride, name="downsample_conv")(x)
            shortcut = norm(name="downsample_bn")(shortcut, train=train)
        y = conv(self.width, 1, name="conv1")(x)
        y = nn.relu(norm(name="bn1")(y, train=train))
        y = conv(self.width, 3, self.stride, name="conv2")(y)
        y = nn.relu(norm(name="bn2")(y, train=train))
        y = conv(out, 1, name="conv3")(y)
        y = norm(name="bn3")(y, train=train)
        return nn.relu(y + shortcut)


class Stage(nn.Module):
    """Residual blocks in a row, named block0, block1, …

    Attributes:
      block: class of the blocks.
      num_blocks: how many there are.
      width: of every block.
      stride: of the first block; the others have 1.
      options: dtype, param_dtype and axis_name of the blocks.
    """

    block: type[nn.Module]
    num_blocks: int
    width: int
    stride: int
    options: Any

    @nn.compact
    def __call__(
        self, x: Float[Array, "b h w c"], *, train: bool, after_block: Mapping[int, nn.Module] | None = None
    ) -> Float[Array, "b h2 w2 c2"]:
        """Applies the blocks; `after_block` maps a block's number to a module that follows it."""
        for i in range(self.num_blocks):
            block = self.block(self.width, self.stride if i == 0 else 1, **self.options, name=f"block{i}")
            x = block(x, train=train)
            if after_block and i in after_block:
                x = after_block[i](x, train=train)  # type: ignore[operator]
        return x


@runtime_checkable
class Backbone(Protocol):
    """What makes the stem and the four stages of a network, and names their weights in PyTorch: a frozen dataclass.

    Attributes:
      published_names: rules (pattern, replacement), applied in order, that turn a Flax path joined by "/" into the name
        in PyTorch, likewise with "/". A method may have put a prefix before the path.
    """

    published_names: ClassVar[Sequence[tuple[str, str]]]

    def channels(self, number: int) -> int:
        """The number of output channels of stage `number`, 1 to 4."""
        ...

    def stem(self, **options: Any) -> nn.Module:
        """Makes the module named `stem`, called as `stem(images float[b, h, w, 3], train=…)`; stage 1 takes its output.

        `options` are dtype, param_dtype and axis_name, as for the modules of this file.
        """
        ...

    def stage(self, number: int, **options: Any) -> nn.Module:
        """Makes the module named `stage{number}`, called as `stage(x, train=…)`; `options` as for `stem`."""
        ...

    def describe(self, names: Iterable[str]) -> str:
        """Describes, for errors, the backbone of this class that a state dict holds, whatever its size.

        Args:
          names: of the state dict's arrays, in PyTorch. They may begin with a method's prefix, and names of other
            parts of a network may be among them.

        Returns:
          A description, or '' if no name is one of this class of backbones.
        """
        ...


@dataclass(frozen=True)
class ResNet:
    """torchvision's ResNet. The stem leaves a quarter of the images' height and width; stages 2 and 3 each halve that.

    Attributes:
      block: BasicBlock or Bottleneck.
      stage_sizes: number of blocks in each of the four stages.
      width: channels of the stem.
    """

    block: type[BasicBlock] | type[Bottleneck]
    stage_sizes: Sequence[int]
    width: int = 64

    published_names: ClassVar[Sequence[tuple[str, str]]] = TORCHVISION_NAMES

    def channels(self, number: int) -> int:
        """The number of output channels of stage `number`."""
        return self.block.expansion * self.width * 2 ** (number - 1)

    def stem(self, **options: Any) -> nn.Module:
        """Makes the module `stem`."""
        return Stem(self.width, **options, name="stem")

    def stage(self, number: int, **options: Any) -> nn.Module:
        """Makes the module `stage{number}`."""
        stride = 2 if number in (2, 3) else 1
        width, num_blocks = self.width * 2 ** (number - 1), self.stage_sizes[number - 1]
        return Stage(self.block, num_blocks, width, stride, options, name=f"stage{number}")

    def describe(self, names: Iterable[str]) -> str:
        """For example 'resnet18 (stages of (2, 2, 2, 2) basic blocks)', or only the stages if they have no name."""
        names = list(names)
        blocks = {match.groups() for name in names if (match := re.search(r"\blayer(\d)\.(\d+)\.", name))}
        if not blocks:
            return ""
        sizes = tuple(sum(stage == str(number) for stage, _ in blocks) for number in range(1, 5))
        has_third = any(re.search(r"\blayer1\.0\.conv3\.weight$", name) for name in names)
        block, kind = (Bottleneck, "bottlenecks") if has_third else (BasicBlock, "basic blocks")
        known = [name for name, backbone in BACKBONES.items() if backbone == ResNet(block, sizes)]
        stages = f"stages of {sizes} {kind}"
        return f"{known[0]} ({stages})" if known else stages


# The backbones by the names, torchvision's, that the setting `model.backbone` takes.
BACKBONES: dict[str, Backbone] = {
    "resnet18": ResNet(BasicBlock, (2, 2, 2, 2)),
    "resnet34": ResNet(BasicBlock, (3, 4, 6, 3)),
    "resnet50": ResNet(Bottleneck, (3, 4, 6, 3)),
    "resnet101": ResNet(Bottleneck, (3, 4, 23, 3)),
    "resnet152": ResNet(Bottleneck, (3, 8, 36, 3)),
}


def make_backbone(name: str, stage_sizes: Sequence[int] = (), width: int = 64) -> Backbone:
    """The backbone called `name`, at its own size or, if it is a ResNet, at another one.

    Args:
      name: one of `BACKBONES`.
      stage_sizes: number of blocks in each of the four stages; () leaves the backbone's own.
      width: channels of the stem.

    Raises:
      UserError: no backbone has that name, or another size was asked of one that is not a ResNet.
    """
    if name not in BACKBONES:
        raise UserError(f"model.backbone = {name!r}: expected one of {', '.join(map(repr, BACKBONES))}")
    backbone = BACKBONES[name]
    if not stage_sizes and width == 64:
        return backbone
    if not isinstance(backbone, ResNet):
        raise UserError(f"model.backbone = {name!r}: takes no model.stage_sizes and model.width; leave them unset")
    return replace(backbone, stage_sizes=tuple(stage_sizes) or backbone.stage_sizes, width=width)
