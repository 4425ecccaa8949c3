"""ResNet as torchvision defines it (v1.5: the stride sits on the 3×3 convolution), NHWC; 18, 34, 50, 101 and 152.

torchvision's padding is symmetric: half the kernel's size, never "SAME". In person re-identification stage 4 keeps the
resolution of stage 3 (its stride is 1).
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

# Flax path → torchvision's name, "/" for "."; applied one after the other.
TORCHVISION_NAMES = (
    (r"\bstem/", ""),
    (r"\bstage(\d)/block(\d+)/", r"layer\1/\2/"),
    (r"/downsample_conv/", "/downsample/0/"),
    (r"/downsample_bn/", "/downsample/1/"),
)


def convolution(features: int, size: int, stride: int = 1, **options: Any) -> nn.Conv:
    """A convolution without bias, size × size, with torchvision's padding and start."""
    return nn.Conv(
        features, (size, size), stride, padding=size // 2, use_bias=False, kernel_init=kaiming_fan_out, **options
    )


class Stem(nn.Module):
    """7×7 convolution with stride 2, batch norm, ReLU, 3×3 max-pool with stride 2: a quarter of the resolution."""

    width: int = 64
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32
    axis_name: str | None = None

    @nn.compact
    def __call__(self, images: Float[Array, "b h w 3"], *, train: bool) -> Float[Array, "b h4 w4 c"]:
        x = convolution(self.width, 7, 2, dtype=self.dtype, param_dtype=self.param_dtype, name="conv1")(images)
        x = BatchNorm(axis_name=self.axis_name, param_dtype=self.param_dtype, name="bn1")(x, train=train)
        # flax has no types here; a checker infers padding's from its default, a string.
        return nn.max_pool(nn.relu(x), (3, 3), (2, 2), padding=((1, 1), (1, 1)))  # pyright: ignore[reportArgumentType]


class BasicBlock(nn.Module):
    """3×3 → 3×3 with a shortcut; projects the shortcut where the shape changes.

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
    """1×1 → 3×3 → 1×1 with a shortcut; projects the shortcut where the shape changes.

    Attributes:
      width: channels of the 3×3 convolution; the block puts out 4·width.
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
    """Blocks named block0, block1, …; the first one has the stride. `options` are the blocks' further fields.

    `behind` has modules of another network that follow a block, by the block's number.
    """

    block: type[nn.Module]
    num_blocks: int
    width: int
    stride: int
    options: Any

    @nn.compact
    def __call__(
        self, x: Float[Array, "b h w c"], *, train: bool, behind: Mapping[int, nn.Module] | None = None
    ) -> Float[Array, "b h2 w2 c2"]:
        for i in range(self.num_blocks):
            block = self.block(self.width, self.stride if i == 0 else 1, **self.options, name=f"block{i}")
            x = block(x, train=train)
            if behind and i in behind:
                x = behind[i](x, train=train)  # type: ignore[operator]
        return x


@runtime_checkable
class Backbone(Protocol):
    """A stem and four stages, and what their weights look like in PyTorch; a frozen dataclass.

    `options` are dtype, param_dtype and axis_name, as for the modules of this file. In `published_names`, which turn
    Flax's paths into PyTorch's names, a path is joined by "/", and comes with a method's prefix or without.
    """

    published_names: ClassVar[Sequence[tuple[str, str]]]

    def channels(self, number: int) -> int:
        """How many channels stage `number`, 1 to 4, puts out."""
        ...

    def stem(self, **options: Any) -> nn.Module:
        """The module `stem`, from images b×h×w×3 to what stage 1 takes, called as `stem(images, train=…)`."""
        ...

    def stage(self, number: int, **options: Any) -> nn.Module:
        """The module `stage{number}`, called as `stage(x, train=…)`."""
        ...

    def describe(self, names: Iterable[str]) -> str:
        """Which backbone of this class, of any size, some weights are of, by their names in PyTorch; '' for none.

        The names may begin with a method's prefix, and there may be others among them. Errors say it.
        """
        ...


@dataclass(frozen=True)
class ResNet:
    """The backbone of torchvision: a quarter of the resolution after the stem, half as much after stages 2 and 3 each.

    Attributes:
      block: BasicBlock or Bottleneck.
      stage_sizes: blocks of the four stages.
      width: channels of the stem.
    """

    block: type[BasicBlock] | type[Bottleneck]
    stage_sizes: Sequence[int]
    width: int = 64

    published_names: ClassVar[Sequence[tuple[str, str]]] = TORCHVISION_NAMES

    def channels(self, number: int) -> int:
        """How many channels stage `number` puts out."""
        return self.block.expansion * self.width * 2 ** (number - 1)

    def stem(self, **options: Any) -> nn.Module:
        """The module `stem`."""
        return Stem(self.width, **options, name="stem")

    def stage(self, number: int, **options: Any) -> nn.Module:
        """The module `stage{number}`."""
        stride = 2 if number in (2, 3) else 1
        width, num_blocks = self.width * 2 ** (number - 1), self.stage_sizes[number - 1]
        return Stage(self.block, num_blocks, width, stride, options, name=f"stage{number}")

    def describe(self, names: Iterable[str]) -> str:
        """Its name, where it has one, and its stages: 'resnet18 (stages of (2, 2, 2, 2) basic blocks)'."""
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


# The backbones that `model.backbone` names, by torchvision's names.
BACKBONES: dict[str, Backbone] = {
    "resnet18": ResNet(BasicBlock, (2, 2, 2, 2)),
    "resnet34": ResNet(BasicBlock, (3, 4, 6, 3)),
    "resnet50": ResNet(Bottleneck, (3, 4, 6, 3)),
    "resnet101": ResNet(Bottleneck, (3, 4, 23, 3)),
    "resnet152": ResNet(Bottleneck, (3, 8, 36, 3)),
}


def make_backbone(name: str, stage_sizes: Sequence[int] = (), width: int = 64) -> Backbone:
    """The backbone of that name; with other blocks in its stages, or another stem, where they are given.

    Raises:
      UserError: no backbone of that name, or one that is not a ResNet and takes no other size.
    """
    if name not in BACKBONES:
        raise UserError(f"model.backbone = {name!r}: expected one of {', '.join(map(repr, BACKBONES))}")
    backbone = BACKBONES[name]
    if not stage_sizes and width == 64:
        return backbone
    if not isinstance(backbone, ResNet):
        raise UserError(f"model.backbone = {name!r}: takes no model.stage_sizes and model.width; leave them unset")
    return replace(backbone, stage_sizes=tuple(stage_sizes) or backbone.stage_sizes, width=width)
