"""Nearest neighbours as a classifier: how well a net's features tell classes apart, without any training.

The vote is that of Wu et al., "Unsupervised Feature Learning via Non-Parametric Instance Discrimination", CVPR 2018,
arXiv:1805.01978, section 3.4; with 20 neighbours as Caron et al., "Emerging Properties in Self-Supervised Vision
Transformers" (DINO), ICCV 2021, arXiv:2104.14294, take it.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from dalikd.kd.backbones.layers import Normalized
from dalikd.kd.losses.base import full_precision

__all__ = ["classifier_inputs", "knn_scores"]

_ROWS_AT_ONCE = 65536  # of the bank: with 256 features at once, 64 MiB of similarities in float32


def classifier_inputs(net: Normalized, classifiers: Iterable[nn.Module], pixels: Tensor) -> Tensor:
    """What the classifiers of a net see of pixels [B, 3, S, S]: [B, D], one beside the other, in at least float32.

    Args:
        net: in any mode.
        classifiers: modules of it, as `find_classifier` gives them.
        pixels: uint8 or float, 0..255.

    Raises:
        ValueError: the net does not call them.
    """
    seen: list[Tensor] = []
    hooks = [part.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0])) for part in classifiers]
    try:
        net(pixels)
    finally:
        for hook in hooks:
            hook.remove()
    if not seen:
        raise ValueError(f"{type(net.model).__name__} does not call the classifier that it names")
    return full_precision(torch.cat([features.flatten(1) for features in seen], dim=1))


def knn_scores(
    features: Tensor, bank: Tensor, labels: Tensor, classes: int, neighbours: int = 20, temperature: float = 0.07
) -> Tensor:
    """Scores of the classes [B, classes]: each of the nearest rows of a bank votes for its class with the weight
    exp(similarity / temperature). Rows have unit length: similarities are cosines.

    Args:
        features: [B, D].
        bank: [N, D], in the features' dtype.
        labels: of the bank's rows, int64 [N].
        classes: their number.
        neighbours: rows that vote, from 1 to N.
        temperature: published: 0.07.
    """
    with torch.autocast(features.device.type, enabled=False):
        parts = [(features @ rows.T).topk(min(neighbours, len(rows))) for rows in bank.split(_ROWS_AT_ONCE)]
    similarities, places = torch.cat([part.values for part in parts], dim=1).topk(neighbours)
    found = [own[part.indices] for own, part in zip(labels.split(_ROWS_AT_ONCE), parts, strict=True)]
    votes = (similarities / temperature).exp()
    return votes.new_zeros(len(features), classes).scatter_add(1, torch.cat(found, dim=1).gather(1, places), votes)
