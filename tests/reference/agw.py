"""AGW and CAJ in PyTorch, from docs/methods.md; an independent check of the Flax methods.

State-dict names are those of the published checkpoints, without the parts of their three ResNets that nothing uses.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.reference.resnet import ResNet, initialise


class NonLocal(nn.Module):
    """z = BN(W y) + x, y = (θᵀφ / N) g, one inner channel."""

    def __init__(self, channels: int):
        super().__init__()
        self.g = nn.Sequential(nn.Conv2d(channels, 1, 1))
        self.theta = nn.Conv2d(channels, 1, 1)
        self.phi = nn.Conv2d(channels, 1, 1)
        self.W = nn.Sequential(nn.Conv2d(1, channels, 1), nn.BatchNorm2d(channels))

    def forward(self, x: Tensor) -> Tensor:
        g, theta, phi = (layer(x).flatten(2).transpose(1, 2) for layer in (self.g, self.theta, self.phi))  # (B, N, 1)
        affinity = theta @ phi.transpose(1, 2) / g.shape[1]  # (B, N, N)
        y = (affinity @ g).transpose(1, 2).reshape(x.shape[0], 1, *x.shape[2:])
        return self.W(y) + x


def _named(**parts: nn.Module) -> nn.Module:
    module = nn.Module()
    for name, part in parts.items():
        module.add_module(name, part)
    return module


class AGW(nn.Module):
    """The network; `forward` takes the visible images and the infrared ones, each with its own stem."""

    def __init__(self, num_ids: int, *, stage_sizes: Sequence[int] = (3, 4, 6, 3), width: int = 64):
        super().__init__()
        visible, thermal, shared = (ResNet(stage_sizes, width) for _ in range(3))
        stems = {
            name: _named(conv1=net.conv1, bn1=net.bn1) for name, net in (("visible", visible), ("thermal", thermal))
        }
        self.visible_module = _named(visible=stems["visible"])
        self.thermal_module = _named(thermal=stems["thermal"])
        self.base_resnet = _named(base=_named(**{f"layer{i}": getattr(shared, f"layer{i}") for i in range(1, 5)}))
        self.NL_2 = nn.ModuleList([NonLocal(8 * width) for _ in range(min(2, stage_sizes[1]))])
        self.NL_3 = nn.ModuleList([NonLocal(16 * width) for _ in range(min(3, stage_sizes[2]))])
        self.bottleneck = nn.BatchNorm1d(32 * width)
        self.bottleneck.bias.requires_grad_(False)
        self.classifier = nn.Linear(32 * width, num_ids, bias=False)
        initialise(self, torch.Generator().manual_seed(0))
        with torch.no_grad():
            for block in (*self.NL_2, *self.NL_3):
                for layer in (block.g[0], block.theta, block.phi):
                    layer.weight.mul_(0.1 / layer.weight.std())

    @property
    def bn_neck(self) -> nn.Module:
        """Under the name that `randomise` knows."""
        return self.bottleneck

    def forward(self, visible: Tensor, infrared: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Pooled features, embeddings and logits: the visible images' rows, then the infrared ones'."""
        stems = (self.visible_module.visible, visible), (self.thermal_module.thermal, infrared)
        parts = [F.relu(stem.bn1(stem.conv1(x))) for stem, x in stems if len(x)]
        x = torch.cat([F.max_pool2d(part, 3, 2, 1) for part in parts])
        for number in range(1, 5):
            stage = getattr(self.base_resnet.base, f"layer{number}")
            blocks = {2: self.NL_2, 3: self.NL_3}.get(number, ())
            for index, block in enumerate(stage):
                x = block(x)
                behind = index - (len(stage) - len(blocks))
                if behind >= 0:
                    x = blocks[behind](x)
        pooled = ((x**3).mean(dim=(2, 3)) + 1e-12) ** (1 / 3)
        embedding = self.bottleneck(pooled)
        return pooled, embedding, self.classifier(embedding)


def weighted_distances(features: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """d_p and d_n of every image, one anchor after the other."""
    near, far = [], []
    for anchor, label in zip(features, labels, strict=True):
        distance = (features - anchor).square().sum(dim=1).clamp(min=1e-12).sqrt()
        positive, negative = distance[labels == label], distance[labels != label]
        weights = torch.exp(positive - positive.max())
        near.append((positive * weights).sum() / (weights.sum() + 1e-6))
        weights = torch.exp(-negative)
        far.append((negative * weights).sum() / (weights.sum() + 1e-6))
    return torch.stack(near), torch.stack(far)


def triplet(features: Tensor, labels: Tensor) -> Tensor:
    """AGW's weighted regularised triplet loss."""
    near, far = weighted_distances(features, labels)
    return torch.log1p(torch.exp(near - far)).mean()


def squared_difference(features: Tensor, labels: Tensor) -> Tensor:
    """CAJ's enhanced squared difference."""
    near, far = weighted_distances(features, labels)
    squared = (near - far).square().clamp(max=88)
    sign = torch.where(near > far, -1.0, 1.0).to(squared)
    return torch.log1p(torch.exp(-sign * squared)).mean()


def make_optimizer(model: AGW, rate: float) -> torch.optim.SGD:
    """Neck and classifier at `rate`, the rest at a tenth of it."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    head = [p for name, p in trained.items() if name.startswith(("bottleneck", "classifier"))]
    body = [p for name, p in trained.items() if not name.startswith(("bottleneck", "classifier"))]
    groups = [{"params": head, "lr": rate}, {"params": body, "lr": rate / 10}]
    return torch.optim.SGD(groups, weight_decay=5e-4, momentum=0.9, nesterov=True)


def set_rate(optimizer: torch.optim.SGD, rate: float) -> None:
    """The head's rate, and a tenth of it for the rest."""
    for group, factor in zip(optimizer.param_groups, (1, 0.1), strict=True):
        group["lr"] = rate * factor
