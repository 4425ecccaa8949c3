"""MPANet's losses in PyTorch, eq. 7 to 14, in the paper's form and in the published program's (docs/method.md)."""

import torch
from torch import Tensor
from torch.nn import functional as F

from tests.reference.model import MPANet, Outputs

MARGIN = 0.7  # ρ
WEIGHTS = {"id": 1.0, "cc": 1.0, "sep": 0.5, "sid": 0.5, "mm": 2.5}  # eq. 14


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """−log P(y) per image, (B,)."""
    return -F.log_softmax(logits, dim=1).gather(1, labels[:, None])[:, 0]


def kl_divergence(log_a: Tensor, log_b: Tensor) -> Tensor:
    """KL(a ‖ b) = Σ a log(a / b) per image, from log-probabilities, (B,)."""
    return (log_a.exp() * (log_a - log_b)).sum(dim=1)


def mean_of_each_modality(values: Tensor, modality: Tensor) -> Tensor:
    """The mean over the visible images plus the mean over the infrared images."""
    return values[modality == 0].mean() + values[modality == 1].mean()


def separation_loss(maps: Tensor | None) -> Tensor:
    """L_sep, eq. 7, of M (B, l, h, w): overlap of two maps summed over positions, mean over pairs and images."""
    if maps is None:
        return torch.zeros(())
    patterns = maps.shape[1]
    flat = maps.flatten(2)
    overlap = flat @ flat.transpose(1, 2)  # MᵀM, (B, l, l)
    pairs = torch.triu(torch.ones(patterns, patterns, dtype=torch.bool), diagonal=1)
    return (overlap[:, pairs].sum(dim=1) * 2 / (patterns * (patterns - 1))).mean()


def distance(a: Tensor, b: Tensor) -> Tensor:
    """L2 distance over the last axis; its gradient at distance 0 is 0."""
    squared = (a - b).square().sum(dim=-1)
    apart = squared > 0
    return torch.where(apart, torch.where(apart, squared, torch.ones_like(squared)).sqrt(), torch.zeros_like(squared))


def center_cluster_loss(feature: Tensor, labels: Tensor, margin: float = MARGIN) -> Tensor:
    """L_cc, eq. 13, on f before the neck (B, D); centres are taken over both modalities and carry gradients."""
    identities, own = torch.unique(labels, return_inverse=True)
    centers = torch.stack([feature[labels == identity].mean(dim=0) for identity in identities])
    pull = distance(feature, centers[own]).mean()
    first, second = torch.triu_indices(len(identities), len(identities), offset=1)
    push = F.relu(margin - distance(centers[first], centers[second])).mean()
    return pull + push


def losses(
    model: MPANet,
    outputs: Outputs,
    labels: Tensor,
    modality: Tensor,
    *,
    preset: str = "paper",
    center_cluster: bool = True,
) -> dict[str, Tensor]:
    """All terms, unweighted, under `id`, `cc`, `sep`, `sid`, `mm`, and their weighted sum under `total`.

    `preset` is "paper" or "official". In the latter L_id is one mean over the batch, L_sid counts twice, and L_MM is
    KL(own ‖ mean classifier of the other modality) as one mean over the batch. Neither lets a gradient through the mean
    classifiers' predictions. Terms that the model or `center_cluster=False` switches off are left out (without PAM,
    L_sep is 0).
    """
    official = {"paper": False, "official": True}[preset]
    g = outputs.embedding
    terms, weights = {}, dict(WEIGHTS)

    identity = cross_entropy(model.classifier(g), labels)
    terms["id"] = identity.mean() if official else mean_of_each_modality(identity, modality)
    terms["sep"] = separation_loss(outputs.pattern_maps).to(g)
    if center_cluster:
        terms["cc"] = center_cluster_loss(outputs.feature, labels)

    if model.modality_learning:
        visible = (modality == 0)[:, None]
        own = torch.where(visible, model.visible_classifier(g), model.infrared_classifier(g))
        with torch.no_grad():  # the mean classifier of the other modality
            teacher = torch.where(visible, model.infrared_classifier_(g), model.visible_classifier_(g))
        log_own, log_teacher = F.log_softmax(own, dim=1), F.log_softmax(teacher, dim=1)
        terms["sid"] = mean_of_each_modality(cross_entropy(own, labels), modality)
        if official:
            weights["sid"] *= 2
            terms["mm"] = kl_divergence(log_own, log_teacher).mean()
        else:
            terms["mm"] = mean_of_each_modality(kl_divergence(log_teacher, log_own), modality)

    terms["total"] = sum(weights[name] * term for name, term in terms.items())
    return terms
