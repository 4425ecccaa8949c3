"""One MPANet training step in PyTorch: EMA, forward, losses, backward, Adam with L2 weight decay."""

import torch
from torch import Tensor

from tests.reference.losses import losses
from tests.reference.model import MPANet

WEIGHT_DECAY = 5e-4


def make_optimizer(model: MPANet, learning_rate: float = 3.5e-4) -> torch.optim.Adam:
    """Adam on every trained parameter; `weight_decay` of `torch.optim.Adam` is the L2 one, added to the gradient."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return torch.optim.Adam(trained, lr=learning_rate, betas=(0.9, 0.999), eps=1e-8, weight_decay=WEIGHT_DECAY)


def ema_ratio(preset: str, epoch: int) -> float:
    """α: 0.2, or in the published program 0.2·min(100/(epoch+1), 1) with epochs counted from 1."""
    return {"paper": 0.2, "official": 0.2 * min(100 / (epoch + 1), 1.0)}[preset]


@torch.no_grad()
def update_mean_classifiers(model: MPANet, alpha: float) -> None:
    """Eq. 11: E ← (1−α)E + αθ for both modalities."""
    for own, mean in model.classifier_pairs():
        mean.weight.mul_(1 - alpha).add_(own.weight, alpha=alpha)


def train_step(
    model: MPANet,
    optimizer: torch.optim.Optimizer,
    images: Tensor,
    labels: Tensor,
    modality: Tensor,
    *,
    preset: str = "paper",
    epoch: int = 1,
    learning_rate: float | None = None,
    center_cluster: bool = True,
) -> dict[str, Tensor]:
    """One iteration on `images` (B, 3, H, W), normalised, identity-major; returns the loss terms before the update.

    `epoch` counts from 1 and matters for the official α only; `learning_rate` overrides the optimizer's from here on.
    """
    model.train()
    optimizer.zero_grad()
    if learning_rate is not None:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate
    if model.modality_learning:
        update_mean_classifiers(model, ema_ratio(preset, epoch))
    terms = losses(model, model(images), labels, modality, preset=preset, center_cluster=center_cluster)
    terms["total"].backward()
    optimizer.step()
    return {name: term.detach() for name, term in terms.items()}
