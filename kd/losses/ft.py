"""Factor transfer.

Kim, Park and Kwak, "Paraphrasing Complex Network: Network Compression via Factor Transfer", NeurIPS 2018, arXiv
1802.04977.
"""

import math
from collections.abc import Sequence
from copy import deepcopy
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from dalikd.kd.connectors import check_maps, pool_alike
from dalikd.kd.losses.at import attention_map, check_power
from dalikd.kd.losses.base import FeatureLoss, LossContext, StepOutputs, Weight, full_precision
from dalikd.kd.losses.fitnet import hint_loss

__all__ = ["FT", "Paraphraser", "Translator", "ft_loss"]


def ft_loss(student_factor: Tensor, teacher_factor: Tensor, p1: float = 2.0, p2: float = 1.0) -> Tensor:
    """Mean of |difference|^p2 of the factors' attention maps of power p1.

    The paper compares the whole factors, of length 1. The mean of |factor|^p1 over the channels is how Tian et al.
    (ICLR 2020, arXiv 1910.10699) compare them.

    Args:
        student_factor: [n, C, H, W]. The larger of the two is average-pooled to the size of the smaller.
        teacher_factor: likewise; channels may differ.
        p1: 1 or more.
        p2: 1 or more.

    Returns:
        A scalar in float32 (float64 stays).
    """
    pooled = pool_alike(full_precision(student_factor), full_precision(teacher_factor))
    student, teacher = (attention_map(factor, p1) for factor in pooled)
    return (student - teacher).abs().pow(p2).mean()


class Paraphraser(nn.Module):
    """An autoencoder of the teacher's features; what its encoder gives is their factor.

    Three 3x3 convolutions to a share of the channels, and three transposed ones back, each with a leaky ReLU.

    Args:
        channels: C, of the features.
        k: share of them that the factor has.
    """

    def __init__(self, channels: int, k: float = 0.5) -> None:
        super().__init__()
        factor = int(k * channels)
        self.encoder = _convolutions(nn.Conv2d, (channels, channels, factor, factor))
        self.decoder = _convolutions(nn.ConvTranspose2d, (factor, factor, channels, channels))

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Factor [n, int(k * C), H, W] and reconstruction [n, C, H, W] of features [n, C, H, W]."""
        factor = self.encoder(features)
        return factor, self.decoder(factor)


class Translator(nn.Module):
    """What makes a factor of the student's features: three 3x3 convolutions with batch normalisation.

    Args:
        channels: of the features.
        factor: channels of the factor.
    """

    def __init__(self, channels: int, factor: int) -> None:
        super().__init__()
        self.encoder = _convolutions(nn.Conv2d, (channels, channels, factor, factor), norm=nn.BatchNorm2d)

    def forward(self, features: Tensor) -> Tensor:
        """[n, factor, H, W] of features [n, C, H, W]."""
        return self.encoder(features)


def _convolutions(kind: type[nn.Module], widths: Sequence[int], norm: type[nn.Module] = nn.Identity) -> nn.Sequential:
    layers = [(kind(one, next_, 3, padding=1), norm(next_), nn.LeakyReLU(0.1)) for one, next_ in pairwise(widths)]
    return nn.Sequential(*(layer for block in layers for layer in block))


class FT(FeatureLoss):
    """Factor transfer: the student's translated features are the teacher's paraphrased ones (NeurIPS 2018, arXiv
    1802.04977).

    In the first epochs the paraphraser learns to reconstruct the teacher's features, and the student learns nothing:
    the loss is `reconstruction_weight * MSE`. Then the paraphraser stays as it was at the last step of them, and the
    loss is `ce_weight * CE(x) + weight * FT(x)` of the last stage; see `ft_loss`. The first epochs are part of the run:
    give that many more, and later milestones. In them weight decay goes on, of the student too. In a sum of losses give
    the others a schedule that is 0 in the first epochs.

    Args:
        weight: Of the factors' difference, 0 or more; a number, or a schedule over epochs.
        k: Channels of the factor, as a share of the teacher's.
        p1: Power of the factors' attention maps, 1 or more.
        p2: Power of their difference, 1 or more.
        first_epochs: Epochs of the paraphraser alone, above 0. Tian et al. (ICLR 2020) have 30.
        reconstruction_weight: Of the paraphraser's loss, above 0. With SGD it is a factor of its learning rate: Tian et
            al. have 0.01 for the paraphraser and 0.05 for the rest.
    """

    paper = "Kim et al., NeurIPS 2018, arXiv 1802.04977"
    places = slice(-2, -1)

    def __init__(
        self,
        weight: Weight = 200.0,
        k: float = 0.5,
        p1: float = 2.0,
        p2: float = 1.0,
        first_epochs: float = 5.0,
        reconstruction_weight: float = 0.2,
        **others: Any,
    ) -> None:
        super().__init__(weight, **others)
        check_power("p1", p1)
        check_power("p2", p2)
        numbers = {"k": k, "first_epochs": first_epochs, "reconstruction_weight": reconstruction_weight}
        for name, number in numbers.items():
            if not 0 < number < math.inf:
                raise ValueError(f"{name} is {number}: give a number above 0")
        self.k, self.p1, self.p2 = k, p1, p2
        self.first_epochs, self.reconstruction_weight = first_epochs, reconstruction_weight

    def connect(self, student: Sequence[Tensor], teacher: Sequence[Tensor], context: LossContext) -> None:  # noqa: ARG002
        """Make paraphraser and translator."""
        check_maps("FT", *student, *teacher)
        if len(student) != 1:
            raise ValueError(f"FT compares one feature, and is given {len(student)}: name one of each net")
        channels, wanted = student[0].shape[1], teacher[0].shape[1]
        if int(self.k * wanted) < 1:
            raise ValueError(f"k is {self.k}: of the teacher's {wanted} channels it leaves none, give more")
        self.paraphraser = Paraphraser(wanted, self.k)
        self.translator = Translator(channels, int(self.k * wanted))
        # not the paraphraser's own: the optimizer changes that even where it has no gradient
        self.frozen = deepcopy(self.paraphraser.encoder).requires_grad_(False)

    def compare(self, student: Sequence[Tensor], teacher: Sequence[Tensor], outputs: StepOutputs) -> Tensor:  # noqa: ARG002
        """`ft_loss` of the translated and the paraphrased features."""
        return ft_loss(self.translator(student[0]), self.frozen(teacher[0]), self.p1, self.p2)

    def forward(self, outputs: StepOutputs) -> dict[str, Tensor]:
        """Return "loss", "ce", "ft", "reconstruction"."""
        first = outputs.epoch < self.first_epochs
        with torch.no_grad():
            for kept, values in zip(self.frozen.parameters(), self.paraphraser.encoder.parameters(), strict=True):
                kept.copy_(torch.where(first, values, kept))
        terms = super().forward(outputs)
        (features,) = self.choose(outputs.student, outputs.teacher)[1]
        reconstruction = hint_loss(self.paraphraser(features)[1], features)
        loss = torch.where(first, self.reconstruction_weight * reconstruction, terms["loss"])
        return {**terms, "loss": loss, "reconstruction": reconstruction}
