"""What nets share: what they give, how they take pixels, and how most of them are built."""

from collections.abc import Callable, Sequence
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = [
    "NetOutput",
    "Normalisation",
    "Normalized",
    "ReluBlock",
    "StagedNet",
    "initialise_convolutions",
    "leave_initialised",
    "projection",
    "shape_of",
    "shuffle_channels",
]


class NetOutput(NamedTuple):
    """What a net gives for n images; all but the logits where they are asked for.

    Attributes:
        logits: [n, classes].
        features: of the stem and of each stage, shallow to deep, [n, C, H, W]; then the pooled [n, D], which the
            classifier sees.
        preactivations: of each stage, before its last ReLU, [n, C, H, W].
        heads: logits of auxiliary heads, [n, classes of the head] each.
        each: of several nets that answer as one, the logits of each, [n, classes].
    """

    logits: Tensor
    features: tuple[Tensor, ...] = ()
    preactivations: tuple[Tensor, ...] = ()
    heads: tuple[Tensor, ...] = ()
    each: tuple[Tensor, ...] = ()

    @staticmethod
    def join(outputs: "Sequence[NetOutput]") -> "NetOutput":
        """What nets gave for images in several calls, one after the other."""
        logits, *others = zip(*outputs, strict=True)
        return NetOutput(torch.cat(logits), *(tuple(map(torch.cat, zip(*parts, strict=True))) for parts in others))

    def map(self, change: Callable[[Tensor], Tensor]) -> "NetOutput":
        """The same with every tensor changed."""
        return NetOutput(change(self.logits), *(tuple(map(change, parts)) for parts in self[1:]))

    def first(self, count: int) -> "NetOutput":
        """What belongs to the first images alone."""
        return self.take(slice(count))

    def take(self, rows: Tensor | slice) -> "NetOutput":
        """What belongs to some of the images, by their places."""
        return self.map(lambda part: part[rows])


class Normalisation(NamedTuple):
    """How a net's images are normalised: a number a channel, of pixels scaled to 0..1."""

    mean: tuple[float, ...]
    std: tuple[float, ...]


class Normalized(nn.Module):
    """A net that takes pixels: its first operation normalises, so that batches stay pixels until here.

    Args:
        model: takes normalised images [B, 3, H, W].
        mean: of each channel, of pixels scaled to 0..1.
        std: of each channel, of pixels scaled to 0..1.

    Attributes:
        model: the net alone. Its state_dict is what is saved and published.
        normalisation: mean and std.
    """

    scale: Tensor
    shift: Tensor

    def __init__(self, model: nn.Module, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.model = model
        self.normalisation = Normalisation(tuple(map(float, mean)), tuple(map(float, std)))
        means, stds = (torch.tensor(values, dtype=torch.float64)[:, None, None] for values in (mean, std))
        self.register_buffer("scale", (1 / (255 * stds)).float(), persistent=False)
        self.register_buffer("shift", (-means / stds).float(), persistent=False)

    def forward(self, pixels: Tensor) -> Tensor:
        """Logits [B, C] of pixels [B, 3, H, W], uint8 or float, 0..255."""
        return self.logits_of(self.normalize(pixels))

    def logits_of(self, images: Tensor) -> Tensor:
        """Logits [B, C] of normalised images; a net with auxiliary heads computes none of them."""
        return getattr(self.model, "logits", self.model)(images)

    def outputs(
        self, pixels: Tensor, *, features: bool = False, preactivations: bool = False, heads: bool = False
    ) -> NetOutput:
        """Logits of pixels [B, 3, H, W], and features of the stages where they are asked for.

        Args:
            pixels: uint8 or float, 0..255.
            features: of the stages.
            preactivations: before the stages' last ReLU; they come with the features.
            heads: auxiliary ones of a net that has them; they come with the features.

        Raises:
            ValueError: the net does not give them.
        """
        if not (features or preactivations or heads):
            return NetOutput(self(pixels))
        model, has_heads = self.model, hasattr(self.model, "auxiliary_classifier")
        if heads and not has_heads:
            raise ValueError(f"{type(model).__name__} has no auxiliary heads: take the net NAME_aux")
        if has_heads and not heads:
            model = model.backbone
        given = getattr(model, "preactivations" if preactivations else "outputs", None)
        if given is None:
            kind = "features before their last ReLU" if preactivations else "stage features"
            raise ValueError(f"{type(model).__name__} gives no {kind}: take another net, or a loss without them")
        return given(self.normalize(pixels))

    def normalize(self, pixels: Tensor) -> Tensor:
        """(pixels / 255 - mean) / std, in the parameters' dtype and the pixels' memory format."""
        if pixels.is_cuda or not pixels.is_contiguous(memory_format=torch.channels_last):
            return torch.addcmul(self.shift, pixels.to(self.scale.dtype), self.scale)  # one pass
        # row by row: torch's vector code takes no innermost dimension of 3, and is three times as fast as what does
        batch, channels, height, width = pixels.shape
        rows = pixels.permute(0, 2, 3, 1).reshape(batch * height, width * channels).to(self.scale.dtype)
        shift, scale = (values.flatten().repeat(width) for values in (self.shift, self.scale))
        return torch.addcmul(shift, rows, scale).reshape(batch, height, width, channels).permute(0, 3, 1, 2)


class ReluBlock(nn.Module):
    """A block whose last operation is a ReLU. A subclass gives `preactivation`; `activate` makes the output of it."""

    activate: Callable[[Tensor], Tensor] = staticmethod(F.relu)

    def preactivation(self, features: Tensor) -> Tensor:
        """What enters the last ReLU."""
        raise NotImplementedError

    def forward(self, features: Tensor) -> Tensor:
        return self.activate(self.preactivation(features))


def initialise_convolutions(model: nn.Module) -> None:
    """Kaiming-normal by fan_out (He et al., ICCV 2015); everything else keeps torch's default."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


def _initialise_head(model: nn.Module) -> None:
    initialise_convolutions(model)
    if isinstance(model, nn.Linear):
        nn.init.zeros_(model.bias)


def leave_initialised(model: nn.Module) -> None:
    """Everything keeps torch's default."""


class StagedNet(nn.Module):
    """A net of a stem, stages one after the other, a tail that pools, and a linear classifier.

    A subclass names its stages and its classifier as the published state_dict does, makes them by `make_stage`, and
    gives a `stem`, a `tail` or `around_last_relu` of its own where it differs; `branch` where auxiliary heads have
    a tail too.
    """

    conv1: nn.Module
    bn1: nn.Module
    _stages: ClassVar[tuple[str, ...]] = ("layer1", "layer2", "layer3")
    _classifier: ClassVar[str] = "linear"
    _initialise_head: Callable[[nn.Module], None] = staticmethod(_initialise_head)

    @property
    def stages(self) -> list[nn.Module]:
        """All of them, in order: the output of one is the input of the next."""
        return [getattr(self, name) for name in self._stages]

    def get_classifier(self) -> nn.Module:
        """Pooled features [B, D] -> logits; as timm names it."""
        return getattr(self, self._classifier)

    def stage_modules(self) -> list[nn.Module]:
        """The stages whose outputs are features, shallow to deep."""
        return self.stages

    def make_stage(self, number: int, again: bool = False) -> nn.Module:
        """A fresh stage, to be initialised.

        Args:
            number: of it, from 0.
            again: it follows the last stage, and takes what that gives; the resolution stays.
        """
        raise NotImplementedError

    def branch_points(self) -> tuple[int, ...]:
        """Numbers of the stages behind which auxiliary heads branch off; -1 is the stem."""
        return tuple(range(len(self.stages)))

    def branch_features(self, found: NetOutput) -> tuple[Tensor, ...]:
        """What auxiliary heads take, of what `outputs` gives."""
        return found.features[1:-1]

    def branch(self, stages: list[nn.Module]) -> dict[str, nn.Module]:
        """An auxiliary head up to the pooled [B, D]: a module after the other, by the names that published ones have.

        Args:
            stages: fresh ones, with which it begins.
        """
        pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
        return {"block_extractor": nn.Sequential(*stages), "pool": pool}

    def branches(self, classes: int) -> list[dict[str, nn.Module]]:
        """Fresh modules of auxiliary heads, one a branch point, shallow to deep; each is run in order.

        A head is all that the net does behind its branch point over again. Nothing comes behind the last point: its
        head repeats what comes behind the point before, with channels and resolution kept.

        Args:
            classes: of each head.
        """
        points, heads = self.branch_points(), []
        width = [layer for layer in self.get_classifier().modules() if isinstance(layer, nn.Linear)][-1].in_features
        for point in points:
            again = point == points[-1]
            first = 1 + (points[-2] if again else point)
            stages = [self.make_stage(number, again and number == first) for number in range(first, points[-1] + 1)]
            heads.append({**self.branch(stages), "fc": nn.Linear(width, classes)})
            for module in heads[-1].values():
                self._initialise_head(module)
        return heads

    def stem(self, images: Tensor) -> Tensor:
        """What comes before the first stage."""
        return F.relu(self.bn1(self.conv1(images)))

    def tail(self, features: Tensor) -> Tensor:
        """The last stage's features, pooled to [B, D]."""
        return features.mean(dim=(2, 3))

    def around_last_relu(self, stage: nn.Module, features: Tensor) -> tuple[Tensor, Tensor]:
        """A stage's output before its last ReLU, and its output; where it ends in none, the output twice."""
        *first, last = [stage] if isinstance(stage, ReluBlock) else stage  # type: ignore[misc]
        for block in first:
            features = block(features)
        if not isinstance(last, ReluBlock):
            return (output := last(features)), output
        before = last.preactivation(features)
        return before, last.activate(before)

    def norms_before_last_relu(self) -> list[nn.BatchNorm2d]:
        """The batch norm that ends the last block of each stage whose output is a feature; a stage without one is left
        out."""
        blocks = [
            stage if isinstance(stage, ReluBlock) else [stage, *stage.children()][-1] for stage in self.stage_modules()
        ]
        norms = [[part for part in block.children() if isinstance(part, nn.BatchNorm2d)] for block in blocks]
        return [found[-1] for found in norms if found]

    def forward(self, images: Tensor) -> Tensor:
        """Logits [B, num_classes] of normalised images [B, 3, H, W]."""
        hidden = self.stem(images)
        for stage in self.stages:
            hidden = stage(hidden)
        return getattr(self, self._classifier)(self.tail(hidden))

    def outputs(self, images: Tensor) -> NetOutput:
        """Logits and features of normalised images [B, 3, H, W]."""
        return self._outputs(images, lambda stage, hidden: (output := stage(hidden), output))._replace(
            preactivations=()
        )

    def preactivations(self, images: Tensor) -> NetOutput:
        """Logits, features, and what comes before the stages' last ReLU, of normalised images [B, 3, H, W]."""
        return self._outputs(images, self.around_last_relu)

    def _outputs(self, images: Tensor, run: Callable[[nn.Module, Tensor], tuple[Tensor, Tensor]]) -> NetOutput:
        """`run` gives what comes before a stage's last ReLU, and the stage's output."""
        hidden = self.stem(images)
        features, befores, featured = [hidden], [], self.stage_modules()
        for stage in self.stages:
            before, hidden = run(stage, hidden)
            if any(stage is other for other in featured):
                features.append(hidden)
                befores.append(before)
        pooled = self.tail(hidden)
        return NetOutput(self.get_classifier()(pooled), (*features, pooled), tuple(befores))


def projection(in_channels: int, out_channels: int, stride: int) -> nn.Module:
    """The shortcut: a strided 1x1 convolution with normalisation where the shape changes, else the identity."""
    if stride == 1 and in_channels == out_channels:
        return nn.Identity()
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, 1, stride=stride, bias=False),
        nn.BatchNorm2d(out_channels),
    )


def shuffle_channels(features: Tensor, groups: int) -> Tensor:
    """Interleave the channels of [B, C, H, W]: the first of each group, then the second of each, and so on.

    The result is channels_last in memory, as what a convolution of a channels_last net gives: one copy, and the next
    convolution needs none.
    """
    pixels = features.permute(0, 2, 3, 1)
    return pixels.unflatten(3, (groups, -1)).transpose(3, 4).flatten(3).permute(0, 3, 1, 2)


def shape_of(feature: Tensor) -> str:
    """For messages: the shape of one image's features."""
    return "x".join(map(str, feature.shape[1:]))
