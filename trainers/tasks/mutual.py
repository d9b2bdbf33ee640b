"""Deep mutual learning: nets that are trained together and imitate each other.

Zhang et al., "Deep Mutual Learning", CVPR 2018, arXiv 1706.00384.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from dalikd.kd.backbones.auxiliary import AuxiliaryNet
from dalikd.kd.backbones.layers import Normalized
from dalikd.kd.losses import hsakd_mutual_loss, kd_loss
from dalikd.kd.losses.hsakd import check_heads
from dalikd.kd.losses.kd import check_temperature
from dalikd.kd.rotation import TURNS
from dalikd.trainers.augmentation import Augmenter
from dalikd.trainers.setup import Setup
from dalikd.trainers.tasks.supervised import HsakdTeacher, Supervised, SupervisedInputs, TrainOptions

__all__ = ["HsakdMutual", "Mutual", "MutualOptions"]


@dataclass
class MutualOptions(TrainOptions):
    """Train several nets together that imitate each other (Zhang et al., CVPR 2018).

    Args:
        peers: architectures of the further nets, each made from a seed of its own; model_args, weights and reinit are
            of the first net alone. Default: one more net like the first.
        temperature: divides the logits of all nets where they are compared; default: 1, and 3 for nets with auxiliary
            heads (NAME_aux), which learn from each other's heads too (HSAKD's online form, Yang et al., IJCAI 2021).
    """

    peers: list[str] | None = None
    temperature: float | None = None

    def __post_init__(self) -> None:
        """Raises ValueError for numbers that no training can work with."""
        super().__post_init__()
        if self.temperature is not None:
            check_temperature(self.temperature, "--temperature")
        if self.freeze_backbone:
            raise ValueError("--freeze_backbone true trains the heads of one net: use dalikd train")
        if self.peers is not None and not self.peers:
            raise ValueError("--peers []: name a further net at least, such as '[resnet32]'")

    def build(self, setup: Setup) -> "Mutual | HsakdMutual":
        """The nets and their augmentation."""
        fresh = replace(self, weights=None, reinit=False)
        args = self.model_args if self.peers is None else {}
        nets = [
            replace(fresh, model=name, model_args=args, init_seed=self.net_seed + number).build_student(setup)
            for number, name in enumerate(self.peers or [self.model], start=1)
        ]
        nets, augmenter = [self.build_student(setup), *nets], setup.augmenter(self.augmentation)
        if any(isinstance(net.model, AuxiliaryNet) for net in nets):
            return HsakdMutual(nets, augmenter, self.temperature or 3.0, self.label_smoothing)
        return Mutual(nets, augmenter, self.temperature or 1.0, self.label_smoothing)


class Mutual(Supervised):
    """Each net learns from labels, and from what the others give for the same images.

    Of K nets net k minimises `CE + 1 / (K - 1) * sum over the others l of KL(p_l || p_k)`, where no gradient flows into
    p_l (arXiv 1706.00384, section 2). All nets are updated at once, by one optimizer, from the logits of one
    forward each; the paper updates one after another, each from what the others give after their updates.

    Args:
        nets: take pixels; two or more.
        augmenter: its images take the place of the originals, the same for all nets.
        temperature: of the comparison, which counts times its square; published: 1.
        label_smoothing: share of each label spread evenly over the classes.

    Raises:
        ValueError: one net alone, or an augmentation that picks candidates.
    """

    def __init__(
        self, nets: Sequence[Normalized], augmenter: Augmenter, temperature: float = 1.0, label_smoothing: float = 0.0
    ) -> None:
        if len(nets) < 2:
            raise ValueError(f"{len(nets)} net(s) cannot learn from each other: give two or more")
        super().__init__(nets[0], augmenter, label_smoothing)
        self.peers, self.temperature = nn.ModuleList(nets[1:]), temperature

    @property
    def nets(self) -> dict[str, Normalized]:
        """net0, net1 and so on; the first is that of --model."""
        return {f"net{number}": net for number, net in enumerate((self.student, *self.peers))}  # pyright: ignore[reportReturnType]

    def forward(self, inputs: SupervisedInputs) -> dict[str, Tensor]:
        """Return "loss", then "ce0", "kl0", "ce1" and so on by the number of the net, and the first one's "top1"."""
        logits = [self.logits(net, inputs) for net in self.nets.values()]
        terms: dict[str, Tensor] = {}
        for number, own in enumerate(logits):
            others = [other.detach() for other in logits if other is not own]
            terms[f"ce{number}"] = self.label_loss(own, inputs)
            terms[f"kl{number}"] = torch.stack([kd_loss(own, other, self.temperature) for other in others]).mean()
        top1 = (logits[0].argmax(1) == inputs.labels).float().mean()
        return {"loss": torch.stack(list(terms.values())).sum(), **terms, "top1": top1}


class HsakdMutual(HsakdTeacher):
    """Several nets learn together, each as HSAKD's teachers do and from the others' logits and heads.

    Yang et al., "Hierarchical Self-supervised Augmented Knowledge Distillation", IJCAI 2021, arXiv 2107.13715. All are
    updated at once, by one optimizer, from one forward each, as published for two. With K nets each takes the mean over
    the K - 1 others.

    Args:
        nets: take pixels; two or more, with equally many auxiliary heads.
        augmenter: its images take the place of the originals, the same for all nets.
        temperature: of the comparison; published: 3.
        label_smoothing: as for `HsakdTeacher`.

    Raises:
        ValueError: numbers of heads that differ; or as `HsakdTeacher`.
    """

    def __init__(
        self, nets: Sequence[Normalized], augmenter: Augmenter, temperature: float = 3.0, label_smoothing: float = 0.0
    ) -> None:
        counts = [len(net.model.auxiliary_classifier) if isinstance(net.model, AuxiliaryNet) else 0 for net in nets]
        for number, count in enumerate(counts[1:], start=1):
            check_heads(counts[0], count, "the first net", f"net{number}")
        super().__init__(nets[0], augmenter, label_smoothing)
        for net in nets[1:]:
            assert isinstance(net.model, AuxiliaryNet)
            net.model.detach_heads = False
        self.peers, self.temperature = nn.ModuleList(nets[1:]), temperature

    nets = Mutual.nets

    def forward(self, inputs: SupervisedInputs) -> dict[str, Tensor]:
        """Return "loss"; "ce", "ce_heads", "kd" and "kd_heads", summed over the nets; and the first one's "top1"."""
        found = [net.outputs(inputs.pixels, heads=True) for net in self.nets.values()]
        carried = inputs.labels, inputs.partner_labels, inputs.lam
        terms = hsakd_mutual_loss(found, *carried, temperature=self.temperature, label_smoothing=self.label_smoothing)
        return {**terms, "top1": (found[0].logits[::TURNS].argmax(1) == inputs.labels).float().mean()}
