"""The convolutional trunk of a ResNet in PyTorch, written out so that no torchvision is needed.

Names and arithmetic are those of torchvision's `resnet18` … `resnet152` ("v1.5": the stride sits on the 3×3
convolution): explicit symmetric padding 3 in the stem and 1 in the 3×3 convolutions and the max-pool, BatchNorm with
eps 1e-5 and momentum 0.1, no biases in the convolutions. Two liberties, both by argument: the number of blocks and
the width, for fast tests, and a last stage with stride 1 (the Z₄ of docs/method.md), where torchvision's is 2.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class BasicBlock(nn.Module):
    """3×3 (carries the stride), 3×3; the sum with the shortcut goes through the last ReLU."""

    expansion = 1

    def __init__(self, in_channels: int, width: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, width, kernel_size=3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width, eps=1e-5, momentum=0.1)
        self.conv2 = nn.Conv2d(width, width, kernel_size=3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width, eps=1e-5, momentum=0.1)
        self.downsample = None
        if stride != 1 or in_channels != width:
            self.downsample = nn.Sequential(
                nn.Conv2d(in_channels, width, kernel_size=1, stride=stride, bias=False),
                nn.BatchNorm2d(width, eps=1e-5, momentum=0.1),
            )

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + shortcut)


class Bottleneck(nn.Module):
    """1×1 reduce, 3×3 (carries the stride), 1×1 expand; the sum with the shortcut goes through the last ReLU."""

    expansion = 4

    def __init__(self, in_channels: int, width: int, stride: int):
        super().__init__()
        out_channels = self.expansion * width
        self.conv1 = nn.Conv2d(in_channels, width, kernel_size=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width, eps=1e-5, momentum=0.1)
        self.conv2 = nn.Conv2d(width, width, kernel_size=3, stride=stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width, eps=1e-5, momentum=0.1)
        self.conv3 = nn.Conv2d(width, out_channels, kernel_size=1, bias=False)
        self.bn3 = nn.BatchNorm2d(out_channels, eps=1e-5, momentum=0.1)
        self.downsample = None
        if stride != 1 or in_channels != out_channels:
            self.downsample = nn.Sequential(
                nn.Conv2d(in_channels, out_channels, kernel_size=1, stride=stride, bias=False),
                nn.BatchNorm2d(out_channels, eps=1e-5, momentum=0.1),
            )

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        y = F.relu(self.bn1(self.conv1(x)))
        y = F.relu(self.bn2(self.conv2(y)))
        return F.relu(self.bn3(self.conv3(y)) + shortcut)


class ResNet(nn.Module):
    """Stem and four stages, without the pooling and the `fc` at the end.

    `stage_sizes` (3, 4, 6, 3) of bottlenecks and `width` 64 are ResNet-50; the stages have expansion·width·{1, 2, 4, 8}
    channels. `last_stride` is the stride of stage 4: 1 in MPANet, 2 in torchvision.
    """

    def __init__(
        self,
        stage_sizes: Sequence[int] = (3, 4, 6, 3),
        width: int = 64,
        last_stride: int = 1,
        block_type: type[BasicBlock] | type[Bottleneck] = Bottleneck,
    ):
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, kernel_size=7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(width, eps=1e-5, momentum=0.1)
        channels = width
        for stage, (blocks, stride) in enumerate(zip(stage_sizes, (1, 2, 2, last_stride), strict=True)):
            stage_width = width * 2**stage
            layers = []
            for block in range(blocks):
                layers.append(block_type(channels, stage_width, stride if block == 0 else 1))
                channels = block_type.expansion * stage_width
            self.add_module(f"layer{stage + 1}", nn.Sequential(*layers))
        self.out_channels = (channels // 2, channels)  # of stages 3 and 4

    def forward(
        self,
        x: Tensor,
        after_stage3: Callable[[Tensor], Tensor] = lambda z: z,
        after_stage4: Callable[[Tensor], Tensor] = lambda z: z,
    ) -> Tensor:
        """NCHW images to the feature map of stage 4; `after_stage3` is applied to Z3, `after_stage4` to Z4."""
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.max_pool2d(x, kernel_size=3, stride=2, padding=1)
        x = self.layer3(self.layer2(self.layer1(x)))
        return after_stage4(self.layer4(after_stage3(x)))


@torch.no_grad()
def initialise(module: nn.Module, generator: torch.Generator) -> None:
    """Fan-out Kaiming normal for every convolution, ones and zeros for every BatchNorm: nothing pretrained."""
    for part in module.modules():
        if isinstance(part, nn.Conv2d):
            nn.init.kaiming_normal_(part.weight, mode="fan_out", nonlinearity="relu", generator=generator)
            if part.bias is not None:
                part.bias.zero_()
        elif isinstance(part, (nn.BatchNorm2d, nn.BatchNorm1d)):
            part.weight.fill_(1.0)
            part.bias.zero_()
