"""Manifold mixup: images are mixed in what a net makes of them, after some of its stages.

Verma et al., "Manifold Mixup: Better Representations by Interpolating Hidden States", ICML 2019, arXiv 1806.05236.
An image x' is lam * h + (1 - lam) * h[partner], where h is what the first `layer` stages make of an image, and the rest
of the net goes on from there; layer 0 mixes the images themselves. The partner's h is that of the original, which is
never mixed: so each image may have its own layer, and picks may leave partners out. Teacher and student mix after the
same number of stages of their own, and the student's target on x' is what the teacher says of its own mixture.

The stages are those that a net's `stage_modules()` lists. They are listened to by hooks that are there for one forward
alone.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from dalikd.kd.backbones.layers import NetOutput, Normalized
from dalikd.kd.mixing import DrawnTensors, HiddenMix, Mixed, mixup

__all__ = [
    "LAYERS",
    "MANIFOLD_ALPHA",
    "check_mixable",
    "hidden_mixing",
    "manifold_mixup",
    "mixed_forward",
]

LAYERS = 3  # drawn from: the input, and after the first two stages; published
MANIFOLD_ALPHA = 2.0  # lam ~ Beta(2, 2); published


def manifold_mixup(images: Tensor, draws: DrawnTensors) -> Mixed:
    """Mix those images whose layer is 0; the nets mix the others.

    Args:
        images: uint8 or float [B, C, H, W].
        draws: partner, lam and layer are used.

    Returns:
        float32 images (float64 stays), partners, lam and layers as drawn.

    Raises:
        ValueError: no layers, or draws for another number of images.
    """
    if draws.layer is None or draws.layer.shape != draws.lam.shape:
        found = None if draws.layer is None else tuple(draws.layer.shape)
        raise ValueError(f"layers have shape {found} for {len(images)} images: give layer [B]")
    mixed = mixup(images, draws).images
    at_input = (draws.layer == 0)[:, None, None, None]
    return Mixed(torch.where(at_input, mixed, images), draws.partner, draws.lam, draws.layer)


def check_mixable(model: nn.Module, name: str, compile_mode: str = "off", side: int | None = None) -> None:
    """Check that hidden states of a net can be mixed.

    Args:
        model: takes pixels, or normalised images.
        name: of the net, for the message.
        compile_mode: of torch.compile, which would cut a graph at every hook.
        side: of the images; given, the net has a forward in eval mode over two black ones, which shows whether each
            stage is passed through once and gives states that can be mixed.

    Raises:
        ValueError: it has not stages enough, or none that can be mixed after, or is to be compiled.
    """
    if compile_mode != "off":
        raise ValueError(
            f"--compile {compile_mode} cannot take manifold_mixup, which mixes inside of {name}: use --compile off"
        )
    if len(_stages(model)) < LAYERS:
        raise ValueError(
            f"{name} names fewer than {LAYERS} stages, manifold_mixup mixes after the first {LAYERS - 1}: take another "
            "net, or mixup"
        )
    if side is not None and not _is_passed_through(model, side):
        raise ValueError(
            f"{name} does not pass once through each of its first {LAYERS - 1} stages, or gives no tensor there: "
            "manifold_mixup cannot mix inside of it; take another net, or mixup"
        )


@contextmanager
def hidden_mixing(model: nn.Module, hidden: HiddenMix | None) -> Iterator[None]:
    """In here the last rows of a forward are augmented images, which are mixed with the rows before, the originals.

    Args:
        model: takes [B originals ; n augmented images]; pixels, or normalised images.
        hidden: how the n images are mixed; None for not at all.
    """
    if hidden is None:
        yield
        return
    augmented = len(hidden.lam)

    def mix(layer: int, states: Tensor) -> Tensor:
        originals, own = states[:-augmented], states[-augmented:]
        return torch.cat((originals, _mixed(own, originals, hidden, layer)))

    with _listening(model, mix):
        yield


def mixed_forward(
    model: nn.Module, originals: Tensor, images: Tensor, hidden: HiddenMix, *, joint: bool, features: bool = False
) -> tuple[NetOutput, Tensor]:
    """A net's outputs on originals and on images whose hidden states are mixed with theirs.

    Args:
        model: takes pixels, or normalised images.
        originals: [B, C, H, W].
        images: [n, C, H, W], as `manifold_mixup` gives them.
        hidden: how they are mixed.
        joint: one forward over both, which batch norms see as one batch; else one after the other.
        features: whether those of the originals are wanted; the net is then a Normalized.

    Returns:
        what it gives on the originals, and logits [n, classes] on the images.
    """

    def run(pixels: Tensor) -> NetOutput:
        return model.outputs(pixels, features=True) if features else NetOutput(model(pixels))  # type: ignore[operator]

    if joint:
        with hidden_mixing(model, hidden):
            found = run(torch.cat((originals, images)))
        return found.first(len(originals)), found.logits[len(originals) :]
    kept: dict[int, Tensor] = {}

    def keep(layer: int, states: Tensor) -> Tensor:
        kept[layer] = states
        return states

    with _listening(model, keep):
        found = run(originals)
    with _listening(model, lambda layer, states: _mixed(states, kept[layer], hidden, layer)):
        return found, model(images)


def _mixed(own: Tensor, originals: Tensor, hidden: HiddenMix, layer: int) -> Tensor:
    """States after stage `layer`: those of rows that are mixed there are, the others stay exactly as they were."""
    dtype = torch.promote_types(own.dtype, hidden.lam.dtype)
    share = torch.where(hidden.layer == layer, hidden.lam, torch.ones_like(hidden.lam)).to(dtype)
    share = share.reshape(-1, *[1] * (own.dim() - 1))
    return torch.lerp(originals[hidden.partner].to(dtype), own.to(dtype), share).to(own.dtype)


@contextmanager
def _listening(model: nn.Module, change: Callable[[int, Any], Any]) -> Iterator[None]:
    """In here what leaves stage 1, 2 … of a net is what `change` makes of the number and the states."""
    with ExitStack() as handles:
        for layer, stage in enumerate(_stages(model)[: LAYERS - 1], start=1):

            def hook(_module: nn.Module, _inputs: object, states: Tensor, layer: int = layer) -> Tensor:
                return change(layer, states)

            handles.enter_context(stage.register_forward_hook(hook))
        yield


@torch.no_grad()
def _is_passed_through(model: nn.Module, side: int) -> bool:
    """Whether a forward over two images gives the states of each of the first stages once, as a tensor of two rows."""
    parameter = next(model.parameters())
    images = torch.zeros(2, 3, side, side, dtype=parameter.dtype, device=parameter.device)
    seen: list[int] = []

    def note(layer: int, states: object) -> object:
        seen.append(layer if isinstance(states, Tensor) and len(states) == len(images) else 0)
        return states

    training = model.training
    model.eval()
    with _listening(model, note):
        model(images)
    model.train(training)
    return sorted(seen) == list(range(1, LAYERS))


def _stages(model: nn.Module) -> list[nn.Module]:
    net = model.model if isinstance(model, Normalized) else model
    listed = getattr(net, "stage_modules", None)
    return [] if listed is None else listed()
