"""Nets with auxiliary heads on their stages, for any net that gives `branches`.

Yang et al., "Hierarchical Self-supervised Augmented Knowledge Distillation", IJCAI 2021, arXiv:2107.13715: a head
behind each stage tells class and rotation of an image apart. The names in the state_dict are theirs.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from dalikd.kd.backbones.layers import NetOutput
from dalikd.kd.rotation import TURNS

__all__ = ["AuxiliaryNet"]


class AuxiliaryNet(nn.Module):
    """A net with an auxiliary head behind each of its stages: what comes behind the stage over again, and a linear
    layer for four times the classes. Logit 4y + k of a head is for an image of class y after k quarter turns.

    Called on normalised images [B, 3, H, W] it gives a NetOutput with its heads [B, 4 num_classes], shallow to deep;
    `logits` gives those of the backbone alone and computes no head.

    Args:
        backbone: a net of `create_model`.
        num_classes: of the backbone.
        detach_heads: keep the heads' gradient from the backbone: as published nets alone do when they are called; their
            training, and pairs of them, let it through.

    Attributes:
        backbone: the net. Its state_dict is a plain net's, with "backbone." in front of each key.
        auxiliary_classifier: the heads.
        detach_heads: may be changed at any time.

    Raises:
        ValueError: the net cannot be taken apart behind its stages.
    """

    def __init__(self, backbone: nn.Module, num_classes: int, *, detach_heads: bool = True) -> None:
        super().__init__()
        self.backbone: Any = backbone
        if not hasattr(backbone, "branches"):
            raise ValueError(f"{type(backbone).__name__} names no stages to put auxiliary heads behind")
        self.auxiliary_classifier = _Heads(self.backbone.branches(TURNS * num_classes))
        self.detach_heads = detach_heads

    def forward(self, images: Tensor) -> NetOutput:
        """Logits, features of the stages, and heads of normalised images [B, 3, H, W]."""
        return self.outputs(images)

    def logits(self, images: Tensor) -> Tensor:
        """The backbone's logits [B, num_classes]."""
        return self.backbone(images)

    def outputs(self, images: Tensor) -> NetOutput:
        """The same as a call."""
        return self._with_heads(self.backbone.outputs(images))

    @property
    def preactivations(self) -> Callable[[Tensor], NetOutput]:
        """The same with what comes before the stages' last ReLU, if the backbone gives that."""
        given = self.backbone.preactivations
        return lambda images: self._with_heads(given(images))

    def _with_heads(self, found: NetOutput) -> NetOutput:
        features = self.backbone.branch_features(found)
        if self.detach_heads:
            features = tuple(feature.detach() for feature in features)
        return found._replace(heads=self.auxiliary_classifier(features))

    def stage_modules(self) -> list[nn.Module]:
        """The backbone's."""
        return self.backbone.stage_modules()

    def get_classifier(self) -> nn.Module:
        """The backbone's: pooled features [B, D] -> logits."""
        return self.backbone.get_classifier()

    @property
    def pretrained_cfg(self) -> Any:
        """What timm says of the backbone's weights; nothing of other nets."""
        return getattr(self.backbone, "pretrained_cfg", {})


class _Heads(nn.Module):
    """Heads whose modules are named by kind and number, kind after kind, as published ones are."""

    def __init__(self, heads: list[dict[str, nn.Module]]) -> None:
        super().__init__()
        self._names = [[f"{kind}{number}" for kind in head] for number, head in enumerate(heads, 1)]
        for kind in heads[0]:
            for number, head in enumerate(heads, 1):
                self.add_module(f"{kind}{number}", head[kind])

    def __len__(self) -> int:
        """How many heads there are."""
        return len(self._names)

    def forward(self, features: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Logits of each head, of the features that it branches off from."""
        found = []
        for number, names in enumerate(self._names):
            hidden = features[number]
            for name in names:
                hidden = getattr(self, name)(hidden)
            found.append(hidden)
        return tuple(found)
