"""Deep mutual learning: nets that are trained together and imitate each other.

Zhang et al., "Deep Mutual Learning", CVPR 2018, arXiv 1706.00384.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from dalikd.kd.backbones.layers import Normalized
from dalikd.kd.losses import kd_loss
from dalikd.kd.losses.kd import check_temperature
from dalikd.trainers.augmentation import Augmenter
from dalikd.trainers.setup import Setup
from dalikd.trainers.tasks.supervised import Supervised, SupervisedInputs, TrainOptions

__all__ = ["Mutual", "MutualOptions"]


@dataclass
class MutualOptions(TrainOptions):
    """Train several nets together that imitate each other (Zhang et al., CVPR 2018).

    Args:
        peers: architectures of the further nets, each made from a seed of its own; model_args, weights and reinit are
            of the first net alone. Default: one more net like the first.
        temperature: divides the logits of all nets where they are compared.
    """

    peers: list[str] | None = None
    temperature: float = 1.0

    def __post_init__(self) -> None:
        """Raises ValueError for numbers that no training can work with."""
        super().__post_init__()
        check_temperature(self.temperature, "--temperature")
        if self.peers is not None and not self.peers:
            raise ValueError("--peers []: name a further net at least, such as '[resnet32]'")

    def build(self, setup: Setup) -> "Mutual":
        """The nets and their augmentation."""
        fresh = replace(self, weights=None, reinit=False)
        args = self.model_args if self.peers is None else {}
        nets = [
            replace(fresh, model=name, model_args=args, seed=self.seed + number).build_student(setup)
            for number, name in enumerate(self.peers or [self.model], start=1)
        ]
        augmenter = setup.augmenter(self.augmentation)
        return Mutual([self.build_student(setup), *nets], augmenter, self.temperature, self.label_smoothing)


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
