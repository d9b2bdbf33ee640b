"""Contrastive representation distillation: tell an image's teacher features from those of other images.

Tian, Krishnan and Isola, "Contrastive Representation Distillation", ICLR 2020, arXiv 1910.10699, eq. 18.
"""

import math
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, distributed, nn
from torch.nn import functional

from dalikd.kd.losses.base import FeatureLoss, LossContext, StepOutputs, Weight, full_precision
from dalikd.kd.losses.kd import check_temperature

__all__ = ["CRD", "crd_draws", "crd_loss", "crd_places", "crd_scores"]

_EPS = 1e-7
_GOLDEN, _FIRST, _SECOND = (  # of splitmix64, as signed numbers
    number - 2**64 for number in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
)


def crd_draws(seed: Tensor, step: Tensor, ids: Tensor, count: int) -> Tensor:
    """Random numbers that depend on nothing but (seed, step, id, place): not on the slot in a batch, nor the process.

    The hash of splitmix64 (Steele, Lea and Flood, OOPSLA 2014), applied to one key after the other.

    Args:
        seed: int64 scalar.
        step: int64 scalar.
        ids: int64 [B].
        count: how many for each id.

    Returns:
        int64 [B, count], from 0 to 2^63 - 1.
    """
    keys = _hash(_hash(_hash(seed) + step * _GOLDEN) + ids * _GOLDEN)
    # bits, not a product: torch.compile (2.15) computes products of arange as it does indices, and loses high bits
    return _shift(_hash(keys[:, None] ^ torch.arange(count, device=ids.device)), 1)


def _hash(bits: Tensor) -> Tensor:
    """splitmix64's last part, of int64 whose products wrap around."""
    bits = (bits ^ _shift(bits, 30)) * _FIRST
    bits = (bits ^ _shift(bits, 27)) * _SECOND
    return bits ^ _shift(bits, 31)


def _shift(bits: Tensor, count: int) -> Tensor:
    """To the right; zeros come in, and not the sign."""
    return (bits >> count) & ((1 << (64 - count)) - 1)


def crd_places(draws: Tensor, counts: Tensor) -> Tensor:
    """K of the numbers below n in each row, every one as likely as the others; where K is n or less, none twice.

    The numbers are cut into K stretches, one is taken of each, and all are moved on around the circle by one random
    number. A draw without replacement differs in one thing: here the numbers of one stretch, n / K neighbours, do not
    come together. The sum of anything over a row is the same on average. Where K is above n, each number comes K / n
    times, rounded down or up. No sorting, no repeated draws, no host sync.

    Args:
        draws: random numbers of 0 or more, int64 [B, K + 1].
        counts: n, 1 or more, int64 [B, 1].

    Returns:
        int64 [B, K].
    """
    cuts = torch.arange(draws.shape[1], device=draws.device) * counts // (draws.shape[1] - 1)
    lengths = cuts.diff(dim=1).clamp(min=1)
    return (cuts[:, :-1] + draws[:, :-1] % lengths + draws[:, -1:] % counts) % counts


def crd_scores(embeddings: Tensor, memory: Tensor, rows: Tensor, temperature: float) -> Tensor:
    """How alike embeddings and rows of a memory are: their products over the temperature.

    The rows are copied: B * (K + 1) * D * 4 bytes, which the backward pass needs too (537 MB for B = 64, K = 16384,
    D = 128), once for each memory.

    Args:
        embeddings: [B, D], of length 1.
        memory: [n, D]; no gradient flows into it, and it may be written afterwards.
        rows: of the memory, int64 [B, K + 1].
        temperature: above 0.

    Returns:
        [B, K + 1], the logarithms of the critic before its normalisation.
    """
    with torch.autocast(embeddings.device.type, enabled=False):
        chosen = memory.detach().index_select(0, rows.flatten()).unflatten(0, rows.shape)
        return (embeddings[:, None] @ chosen.mT).squeeze(1) / temperature


def crd_loss(scores: Tensor, images: int) -> Tensor:
    """The loss of a critic that tells the first column from the others (arXiv 1910.10699, eq. 18).

    With h the scores' exponential and c = K / images + 1e-7: the mean over the batch of
    `-log(h / (h + c))` of the first column, less the sum of `log((c - 1e-7) / (h + c))` of the others.

    Args:
        scores: [B, K + 1], logarithms; less the logarithm of their normalisation constant.
        images: rows of the training set.

    Returns:
        A scalar, finite for every finite score: no exponential is taken by itself.
    """
    negatives = scores.shape[1] - 1
    noise = math.log(negatives / images + _EPS)
    first, others = functional.softplus(noise - scores[:, 0]), functional.softplus(scores[:, 1:] - noise)
    return (first + others.sum(1)).mean() + negatives * math.log1p(_EPS * images / negatives)


class CRD(FeatureLoss):
    """Contrastive representation distillation, on linear embeddings of the pooled features (Tian et al., ICLR 2020).

    A memory keeps the student's embedding of every training image, a second one the teacher's. The student's embedding
    of an image is compared with the teacher's memory of it, the positive, and of K other images, the negatives, and the
    teacher's with the student's memory: the sum of `crd_loss` of both. The memories hold 2 * images * feat_dim numbers
    on each device and in the run's saved state: 1.3 GB for ImageNet. `crd_scores` says what a step holds besides.

    Each process keeps the embeddings of all: they are exchanged in training, for which all processes need batches of
    one size. Of an image that comes twice in a step the first embedding counts. In eval mode nothing is written.

    What an image is compared with is a function of seed, step and image: the number of processes and a resume change
    nothing. As published, no negative comes twice where there are K of them; `crd_places` says how else the draws
    differ. The loss is on average that of draws with replacement, of which, for K = 16384, 0.6 % would be repeated on
    ImageNet and 15 % on CIFAR-100.

    Args:
        weight: Of the comparison, 0 or more; a number, or a schedule over epochs.
        feat_dim: Dimensions of the embeddings.
        nce_k: Negatives of an image, K, 1 or more.
        temperature: Divides the products of embeddings, above 0.
        momentum: Share of what a memory keeps of an image's row when the image comes again, in [0, 1).
        negatives: exact: images of other classes, which needs the labels of all; relaxed: any other images.
        mode: exact: the positive is the image itself; relax: a random one of its class, which needs the labels of all.
    """

    paper = "Tian et al., ICLR 2020, arXiv 1910.10699"
    places = slice(-1, None)
    # all of them are the same everywhere, and the images' order alone is large
    local_buffers: ClassVar[tuple[str, ...]] = (
        "student_memory", "teacher_memory", "log_constants", "steps", "seed", "order", "class_starts", "class_sizes",
    )  # fmt: skip

    student_memory: Tensor  # [images, feat_dim], rows of length 1
    teacher_memory: Tensor
    log_constants: Tensor  # of the student's and the teacher's scores, set by the first step
    steps: Tensor  # forward passes in training
    seed: Tensor  # of the draws: torch's when the loss was built, which is the run's
    order: Tensor  # of the images, by class: those of class c begin at class_starts[c]
    class_starts: Tensor
    class_sizes: Tensor

    def __init__(
        self,
        weight: Weight = 0.8,
        feat_dim: int = 128,
        nce_k: int = 16384,
        temperature: float = 0.07,
        momentum: float = 0.5,
        negatives: Literal["exact", "relaxed"] = "exact",
        mode: Literal["exact", "relax"] = "exact",
        **others: Any,
    ) -> None:
        super().__init__(weight, **others)
        for name, value in (("feat_dim", feat_dim), ("nce_k", nce_k)):
            if value < 1:
                raise ValueError(f"{name} is {value}: give 1 or more")
        check_temperature(temperature)
        if not 0 <= momentum < 1:
            raise ValueError(f"momentum is {momentum}: give a number in [0, 1)")
        if negatives not in ("exact", "relaxed"):
            raise ValueError(f"negatives is {negatives!r}: give exact or relaxed")
        if mode not in ("exact", "relax"):
            raise ValueError(f"mode is {mode!r}: give exact or relax")
        self.feat_dim, self.nce_k, self.temperature = feat_dim, nce_k, temperature
        self.momentum, self.negatives, self.mode = momentum, negatives, mode

    @property
    def needs(self) -> frozenset[str]:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Features and ids; for exact negatives, and for positives of the class, the labels of all images."""
        by_class = self.negatives == "exact" or self.mode == "relax"
        return frozenset({"features", "ids"} | ({"all_labels"} if by_class else set()))

    @property
    def label_options(self) -> Sequence[str] | None:
        """The weight of its cross-entropy; None where negatives or positives are chosen by class."""
        return None if "all_labels" in self.needs else super().label_options

    def connect(self, student: Sequence[Tensor], teacher: Sequence[Tensor], context: LossContext) -> None:
        """Embeddings, memories and the images of each class."""
        images = context.images
        if len(student) != 1:
            raise ValueError(f"CRD remembers one feature of each net, and is given {len(student)}: name one of each")
        if images < 2:
            raise ValueError(f"CRD tells an image from others, and there are {images} images: give more")
        self.student_embed, self.teacher_embed = (
            nn.Linear(feature[0].numel(), self.feat_dim) for feature in (student[0], teacher[0])
        )
        seed = torch.initial_seed() % 2**63
        random = torch.Generator().manual_seed(seed)
        for name in ("student_memory", "teacher_memory"):
            memory = torch.empty(images, self.feat_dim).uniform_(-1, 1, generator=random)
            self.register_buffer(name, memory.div_(torch.linalg.vector_norm(memory, dim=1, keepdim=True)))
        self.register_buffer("log_constants", torch.full((2,), -math.inf))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self.register_buffer("seed", torch.tensor(seed))
        if "all_labels" not in self.needs:
            return
        assert context.labels is not None
        if len(context.labels) != images:
            raise ValueError(f"CRD is given {len(context.labels)} labels of {images} images: give one for each")
        sizes = torch.bincount(context.labels, minlength=context.classes)
        if self.negatives == "exact" and sizes.max() == images:
            raise ValueError(
                f"CRD finds no negatives, as all {images} images have the label {int(sizes.argmax())}: take images of "
                "several classes, or --loss.negatives relaxed"
            )
        self.register_buffer("order", context.labels.argsort(stable=True), persistent=False)
        self.register_buffer("class_starts", sizes.cumsum(0) - sizes, persistent=False)
        self.register_buffer("class_sizes", sizes, persistent=False)

    def compare(self, student: Sequence[Tensor], teacher: Sequence[Tensor], outputs: StepOutputs) -> Tensor:
        """`contrast` with what this step compares the images with."""
        return self.contrast(student[0], teacher[0], outputs.ids, self.draw(outputs.ids, outputs.labels))

    def draw(self, ids: Tensor, labels: Tensor) -> Tensor:
        """What the next step compares images with.

        Args:
            ids: int64 [B].
            labels: int64 [B].

        Returns:
            rows of the data set, int64 [B, K + 1]: the positive, then the negatives.
        """
        draws = crd_draws(self.seed, self.steps, ids, self.nce_k + 2)
        ids, labels = ids[:, None], labels[:, None]
        exact, positives = self.negatives == "exact", ids
        if self.mode == "relax":
            positives = self.order[self.class_starts[labels] + draws[:, -1:] % self.class_sizes[labels]]
        starts, sizes = (self.class_starts[labels], self.class_sizes[labels]) if exact else (ids, torch.ones_like(ids))
        places = crd_places(draws[:, :-1], len(self.student_memory) - sizes)
        places = places + (places >= starts) * sizes  # past what is left out
        return torch.cat((positives, self.order[places] if exact else places), 1)

    def contrast(self, student: Tensor, teacher: Tensor, ids: Tensor, rows: Tensor) -> Tensor:
        """The loss of both embeddings; in training they are remembered, for the steps to come.

        Args:
            student: features [B, ...].
            teacher: features [B, ...].
            ids: rows of the data set, int64 [B].
            rows: that each is compared with, int64 [B, K + 1]; the first is the positive.
        """
        with torch.autocast(ids.device.type, enabled=False):
            own, other = (
                functional.normalize(embed(full_precision(features).flatten(1)), dim=1)
                for embed, features in ((self.student_embed, student), (self.teacher_embed, teacher))
            )
        images = len(self.student_memory)
        scores = [
            crd_scores(embeddings, memory, rows, self.temperature)
            for embeddings, memory in ((own, self.teacher_memory), (other, self.student_memory))
        ]
        with torch.no_grad():
            # logarithms of the mean critic of each image
            means = torch.stack([found.logsumexp(1) for found in scores], 1) - math.log(rows.shape[1])
            told = torch.cat((own, other, means), 1)
            if self.training:
                ids, told = _of_all(ids), _of_all(told)
            own_all, other_all, means = told.split([self.feat_dim, self.feat_dim, 2], 1)
            constants = means.logsumexp(0) + math.log(images / len(means))
            constants = torch.where(self.log_constants.isfinite(), self.log_constants, constants)
            if self.training:
                self.log_constants.copy_(constants)
                self._remember(ids, own_all, other_all)
                self.steps.add_(1)
        return crd_loss(scores[0] - constants[0], images) + crd_loss(scores[1] - constants[1], images)

    def _remember(self, ids: Tensor, student: Tensor, teacher: Tensor) -> None:
        """Write the embeddings of one step. Equal ids write equal rows, so that their order does not matter."""
        ascending, order = ids.sort(stable=True)
        first = order[torch.searchsorted(ascending, ids)]
        for memory, embeddings in ((self.student_memory, student), (self.teacher_memory, teacher)):
            mixed = self.momentum * memory[ids] + (1 - self.momentum) * embeddings[first]
            memory.index_copy_(0, ids, functional.normalize(mixed, dim=1))


def _of_all(values: Tensor) -> Tensor:
    """The rows of every process, in the processes' order."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return values
    found = values.new_empty(distributed.get_world_size() * len(values), *values.shape[1:])
    distributed.all_gather_into_tensor(found, values.contiguous())
    return found
