"""MPANet in PyTorch, from docs/method.md and sections 3.2 to 3.4 of the paper; an independent check of the Flax model.

State-dict names are those of the published checkpoints (docs/method.md, "Data sets on disk"). Everything is NCHW here.

The ablation variants of tables 3 and 4, exactly (σ sigmoid, δ ReLU, g global average pooling, Z a stage's output):

- `mam="mam"`: eq. 1-3, m = σ(W₂ δ(W₁ g(Z))), F = m⊙Z + (1−m)⊙IN(Z). `"se"`: F = m⊙Z, same mask, same names.
  `"in"`: F = IN(Z), no parameters. `"none"`: F = Z. `"cbam"`: see below.
- `pam="pam"`: eq. 4-6. `"none"`: f = g(F), no pattern maps, L_sep = 0.
  `"non_local"` (Wang et al., CVPR 2018, embedded Gaussian): θ, φ, γ are 1×1 convolutions with bias from C to C/2
  channels, A = softmax over positions of θᵀφ without scaling, y = A γ, W a 1×1 convolution with bias back to C, then a
  BatchNorm (eps 1e-5, momentum 0.1) whose weight starts at 0; z = F + BN(W y); f = g(z).
  Names `non_local.{theta,phi,g,w}.{weight,bias}`, `non_local.bn.*`.
- `mam="cbam"` goes with `pam="none"` (Woo et al., ECCV 2018): after stages 3 and 4 first
  Z ← σ(MLP(avg Z) + MLP(max Z)) ⊙ Z over channels (one MLP for both, reduction 16, no biases, ReLU), then
  Z ← σ(conv7×7([mean_c Z; max_c Z])) ⊙ Z over positions (padding 3, no bias, no BatchNorm, the mean first); f = g(F).
  Names `backbone.CBAM{3,4}.mlp.{0,2}.weight` (1×1 convolutions), `backbone.CBAM{3,4}.spatial.weight`.
- `modality_learning=False`: no C_v, C_r and no mean classifiers, so neither L_sid nor L_MM.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from tests.reference.resnet import BasicBlock, Bottleneck, ResNet, initialise

REDUCTION = 16

# The networks here are small: several threads would wait for one another for most of the time, busily.
torch.set_num_threads(1)


class Outputs(NamedTuple):
    """What the losses need. B images, C channels of stage 4, l patterns, D = (l + 1)·C."""

    feature: Tensor  # f (B, D), before the neck
    embedding: Tensor  # g (B, D), after the neck
    pattern_maps: Tensor | None  # M (B, l, h, w)


def instance_norm(z: Tensor) -> Tensor:
    """Eq. 3: per image and channel over h×w, biased variance, no parameters, eps 1e-5."""
    centred = z - z.mean(dim=(2, 3), keepdim=True)
    return centred / torch.sqrt(centred.square().mean(dim=(2, 3), keepdim=True) + 1e-5)


class ModalityAlleviation(nn.Module):
    """MAM, eq. 1 and 2, or with `normalise=False` the SE block that replaces it."""

    def __init__(self, channels: int, normalise: bool):
        super().__init__()
        self.normalise = normalise
        self.channel_attention = nn.Sequential(
            nn.Conv2d(channels, channels // REDUCTION, kernel_size=1, bias=False),
            nn.ReLU(),
            nn.Conv2d(channels // REDUCTION, channels, kernel_size=1, bias=False),
        )

    def forward(self, z: Tensor) -> Tensor:
        mask = torch.sigmoid(self.channel_attention(z.mean(dim=(2, 3), keepdim=True)))
        return mask * z + (1 - mask) * instance_norm(z) if self.normalise else mask * z


class InstanceNorm(nn.Module):
    """Table 4's MAM → IN."""

    def forward(self, z: Tensor) -> Tensor:
        return instance_norm(z)


class ConvolutionalBlockAttention(nn.Module):
    """CBAM: attention over channels, then over positions."""

    def __init__(self, channels: int):
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Conv2d(channels, channels // REDUCTION, kernel_size=1, bias=False),
            nn.ReLU(),
            nn.Conv2d(channels // REDUCTION, channels, kernel_size=1, bias=False),
        )
        self.spatial = nn.Conv2d(2, 1, kernel_size=7, padding=3, bias=False)

    def forward(self, z: Tensor) -> Tensor:
        average, peak = z.mean(dim=(2, 3), keepdim=True), z.amax(dim=(2, 3), keepdim=True)
        z = torch.sigmoid(self.mlp(average) + self.mlp(peak)) * z
        summary = torch.cat([z.mean(dim=1, keepdim=True), z.amax(dim=1, keepdim=True)], dim=1)
        return torch.sigmoid(self.spatial(summary)) * z


class NonLocal(nn.Module):
    """The embedded-Gaussian non-local block with a residual connection."""

    def __init__(self, channels: int):
        super().__init__()
        self.theta = nn.Conv2d(channels, channels // 2, kernel_size=1)
        self.phi = nn.Conv2d(channels, channels // 2, kernel_size=1)
        self.g = nn.Conv2d(channels, channels // 2, kernel_size=1)
        self.w = nn.Conv2d(channels // 2, channels, kernel_size=1)
        self.bn = nn.BatchNorm2d(channels, eps=1e-5, momentum=0.1)

    def forward(self, x: Tensor) -> Tensor:
        theta, phi, g = (layer(x).flatten(2) for layer in (self.theta, self.phi, self.g))  # (B, C/2, hw)
        attention = torch.softmax(theta.transpose(1, 2) @ phi, dim=2)  # (B, hw, hw): row i sums over positions j
        y = (attention @ g.transpose(1, 2)).transpose(1, 2)
        return x + self.bn(self.w(y.reshape(y.shape[0], y.shape[1], *x.shape[2:])))


def _attention_after_stage(kind: str, channels: int) -> nn.Module:
    if kind == "cbam":
        return ConvolutionalBlockAttention(channels)
    if kind in ("mam", "se"):
        return ModalityAlleviation(channels, normalise=kind == "mam")
    return {"in": InstanceNorm, "none": nn.Identity}[kind]()


class MPANet(nn.Module):
    """Backbone with MAM, PAM, BN neck, three classifiers and two mean classifiers; arguments as explained above."""

    def __init__(
        self,
        num_ids: int,
        *,
        stage_sizes: Sequence[int] = (3, 4, 6, 3),
        width: int = 64,
        num_patterns: int = 6,
        mam: str = "mam",
        pam: str = "pam",
        modality_learning: bool = True,
        block_type: type[BasicBlock] | type[Bottleneck] = Bottleneck,
        generator: torch.Generator | None = None,
    ):
        super().__init__()
        self.mam, self.pam, self.modality_learning = mam, pam, modality_learning
        self.backbone = ResNet(stage_sizes, width, last_stride=1, block_type=block_type)
        channels3, channels4 = self.backbone.out_channels
        prefix = "CBAM" if mam == "cbam" else "MAM"
        self.backbone.add_module(f"{prefix}3", _attention_after_stage(mam, channels3))
        self.backbone.add_module(f"{prefix}4", _attention_after_stage(mam, channels4))
        self.after_stage3, self.after_stage4 = f"{prefix}3", f"{prefix}4"
        if pam == "pam":
            self.spatial_attention = nn.Conv2d(channels4, num_patterns, kernel_size=1)
        elif pam == "non_local":
            self.non_local = NonLocal(channels4)
        elif pam != "none":
            raise ValueError(pam)
        size = channels4 * (1 + (num_patterns if pam == "pam" else 0))
        self.bn_neck = nn.BatchNorm1d(size, eps=1e-5, momentum=0.1)
        self.bn_neck.bias.requires_grad_(False)
        self.classifier = nn.Linear(size, num_ids, bias=False)
        if modality_learning:
            self.visible_classifier = nn.Linear(size, num_ids, bias=False)
            self.infrared_classifier = nn.Linear(size, num_ids, bias=False)
            self.visible_classifier_ = nn.Linear(size, num_ids, bias=False)
            self.infrared_classifier_ = nn.Linear(size, num_ids, bias=False)
        self.reset(generator or torch.Generator().manual_seed(0))

    @torch.no_grad()
    def reset(self, generator: torch.Generator) -> None:
        """The starting point; mean classifiers are copies of the classifiers (eq. 11)."""
        initialise(self, generator)
        if self.pam == "non_local":
            self.non_local.bn.weight.zero_()
        for part in self.children():
            if isinstance(part, nn.Linear):
                part.weight.normal_(0, 0.001, generator=generator)
        if self.modality_learning:
            for own, mean in self.classifier_pairs():
                mean.weight.copy_(own.weight)
                mean.weight.requires_grad_(False)

    def classifier_pairs(self) -> list[tuple[nn.Linear, nn.Linear]]:
        """Each modality's classifier with its mean classifier: visible, infrared."""
        return [
            (self.visible_classifier, self.visible_classifier_),
            (self.infrared_classifier, self.infrared_classifier_),
        ]

    def forward(self, x: Tensor) -> Outputs:
        """Normalised images (B, 3, H, W) to f, g and M."""
        modules = dict(self.backbone.named_children())
        feature_map = self.backbone(x, modules[self.after_stage3], modules[self.after_stage4])
        if self.pam == "non_local":
            feature_map = self.non_local(feature_map)
        maps, parts = None, [feature_map.mean(dim=(2, 3))]
        if self.pam == "pam":
            maps = torch.sigmoid(self.spatial_attention(feature_map))  # eq. 4
            patterns = [(maps[:, k : k + 1] * feature_map).mean(dim=(2, 3)) for k in range(maps.shape[1])]  # eq. 5
            parts = [*patterns, *parts]  # eq. 6: patterns first, the global feature last
        feature = torch.cat(parts, dim=1)
        return Outputs(feature, self.bn_neck(feature), maps)


@torch.no_grad()
def randomise(model: MPANet, seed: int) -> MPANet:
    """Move every number off its special starting value, so that a comparison of two implementations sees each of them.

    BN weights leave 1, biases 0, running statistics 0 and 1, mean classifiers their originals; the neck's bias stays 0.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=generator, dtype=torch.float64).to(like.dtype)

    for part in model.modules():
        if isinstance(part, (nn.BatchNorm2d, nn.BatchNorm1d)):
            part.weight.copy_(1 + 0.2 * normal(part.weight))
            part.running_mean.copy_(0.2 * normal(part.running_mean))
            part.running_var.copy_(torch.exp(0.2 * normal(part.running_var)))
            if part is not model.bn_neck:
                part.bias.copy_(0.2 * normal(part.bias))
        elif isinstance(part, nn.Conv2d) and part.bias is not None:
            part.bias.copy_(0.2 * normal(part.bias))
        elif isinstance(part, nn.Linear):
            part.weight.copy_(0.05 * normal(part.weight))
    return model
