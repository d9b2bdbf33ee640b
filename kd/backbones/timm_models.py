"""Any timm model, with the stage features that feature-based losses need."""

from collections.abc import Callable
from copy import deepcopy
from difflib import get_close_matches
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from dalikd.kd.backbones.layers import NetOutput

__all__ = ["create_timm_model", "input_statistics"]

_HUB_PREFIXES = ("hf-hub:", "hf_hub:")
_OF_WEIGHTS = ("pretrained", "checkpoint_path")
_STEMS = ("act1", "bn1", "conv_stem", "norm0", "stem")  # how timm names the first features, if they are no stage's


def create_timm_model(name: str, num_classes: int, **kwargs: Any) -> nn.Module:
    """Builds `timm.create_model(name, num_classes=num_classes, **kwargs)` and adds `outputs` and `stage_modules`.

    The state_dict is timm's own. Nothing is downloaded unless `pretrained=True` is among the options.

    Raises:
        ValueError: timm has no such model or weights, the model no such option, or the name asks for a download.
    """
    import timm

    _check_name(name, bool(kwargs.get("pretrained")))
    try:
        model: Any = timm.create_model(name, num_classes=num_classes, **kwargs)
    except (RuntimeError, TypeError) as error:  # timm's own for an unknown tag, Python's for an unknown option
        reason = str(error).partition("\n")[0]
        raise ValueError(f"timm cannot build {name} with the options {sorted(kwargs)}: {reason}") from error
    model.__class__ = _with_stage_features(type(model))
    own = {key: value for key, value in kwargs.items() if key not in _OF_WEIGHTS}
    model.fresh = partial(timm.create_model, name, num_classes=0, **own)
    return model


def input_statistics(model: nn.Module) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
    """Mean and standard deviation, a number a channel and of pixels scaled to 0..1, that a timm model was trained with.

    None where the model does not say.
    """
    config = getattr(model, "pretrained_cfg", None) or {}
    mean, std = config.get("mean"), config.get("std")
    if mean is None or std is None:
        return None
    return tuple(map(float, mean)), tuple(map(float, std))


def _check_name(name: str, pretrained: bool) -> None:
    import timm

    if ":" in name or "/" in name:  # a source that timm reads the architecture from: its own errors are clear
        if name.startswith(_HUB_PREFIXES) and not pretrained:
            raise ValueError(f'"timm:{name}" is downloaded: allow it with pretrained=True, or name an architecture')
        return
    architecture = name.partition(".")[0]  # the rest names a set of weights
    if not timm.is_model(architecture):
        close = get_close_matches(architecture, timm.list_models(), n=4)
        hint = f"did you mean {', '.join(close)}?" if close else "timm.list_models() lists those there are"
        raise ValueError(f'timm has no model "{architecture}": {hint}')


class _StageFeatures:
    """What a timm model is given on top."""

    _timm_class: type
    fresh: Callable[[], nn.Module]  # makes one more of the kind, without classifier

    def outputs(self: Any, images: Tensor) -> NetOutput:
        """Logits, timm's intermediates (NCHW, shallow to deep) and then the pooled [B, D].

        A net with a head for a distillation token (DeiT, LeViT) gives the logits of the class token and those of the
        distillation token as heads; its logits are the mean of both, as its forward gives them.

        Raises:
            ValueError: the model has no `forward_intermediates`.
        """
        if not (hasattr(self, "forward_intermediates") and hasattr(self, "forward_head")):
            name = self._timm_class.__name__
            raise ValueError(f"timm's {name} gives no stage features: take another model or a loss on logits alone")
        final, intermediates = self.forward_intermediates(images)
        # The head runs twice: applying the classifier to the pooled features would be wrong for heads with a norm
        # or several classifiers in between. In training mode dropout in the head therefore draws twice.
        pooled = self.forward_head(final, pre_logits=True)
        features = (*intermediates, pooled)
        if not (isinstance(getattr(self, "head_dist", None), nn.Module) and hasattr(self, "distilled_training")):
            return NetOutput(self.forward_head(final), features)
        states = self.training, self.distilled_training
        self.training = self.distilled_training = True  # timm gives the heads apart only so; dropout has its own state
        one, other = self.forward_head(final)
        self.training, self.distilled_training = states
        return NetOutput((one + other) / 2, features, heads=(one, other))

    def stage_modules(self: Any) -> list[nn.Module]:
        """Modules whose outputs are the features of the stages, shallow to deep; none if timm does not name them.

        What timm calls a stem is left out; a net whose stem has another name has it as its first stage.
        """
        return [self.get_submodule(name) for name in self._stage_names()]

    def _stage_names(self: Any) -> list[str]:
        named = [entry["module"] for entry in getattr(self, "feature_info", [])]
        modules = dict(self.named_modules())
        if not all(name in modules for name in named):
            return []
        stems = [name for name in named if name.startswith("stem") or name.rpartition(".")[2] in _STEMS]
        return [name for name in named if name not in stems]

    def branch_features(self: Any, found: NetOutput) -> tuple[Tensor, ...]:
        """What auxiliary heads take, of what `outputs` gives."""
        return found.features[-1 - len(self._stage_names()) : -1]

    def branches(self: Any, classes: int) -> list[dict[str, nn.Module]]:
        """Fresh modules of auxiliary heads, one a stage, shallow to deep; each is run in order.

        A head is all that the net does behind its stage over again. The last one repeats the last stage, behind a 1x1
        convolution and an enlargement that give it what the stage before would.

        Args:
            classes: of each head.

        Raises:
            ValueError: the net names fewer than two stages, or what follows them cannot be run alone.
        """
        name, stages = self._timm_class.__name__, self._stage_names()
        if len(stages) < 2:
            raise ValueError(f"timm's {name} names no stages to put auxiliary heads behind: take another net")
        try:
            features = self._branch_shapes()
            rests = [_Rest(self.fresh(), stage) for stage in (*stages[:-1], stages[-2])]
            before, last = features[-2:]
            again = nn.Sequential(
                nn.Conv2d(last.shape[1], before.shape[1], 1, bias=False),
                nn.BatchNorm2d(before.shape[1]),
                nn.Upsample(scale_factor=before.shape[2] // last.shape[2]),
                rests.pop(),
            )
            heads = [*rests, again]
            pooled = [_on_meta(head)(feature) for head, feature in zip(heads, features, strict=True)]
        except Exception as error:  # its code may need what is cut away
            reason = str(error).strip().partition("\n")[0]
            raise ValueError(f"what follows the stages of timm's {name} does not run alone: {reason}") from error
        return [
            {"block_extractor": head, "fc": nn.Linear(rows.shape[1], classes)}
            for head, rows in zip(heads, pooled, strict=True)
        ]

    def _branch_shapes(self: Any) -> tuple[Tensor, ...]:
        """What auxiliary heads take, as tensors without values."""
        size = (self.pretrained_cfg or {}).get("input_size", (3, 224, 224))
        return self.branch_features(_on_meta(self).outputs(torch.empty(1, *size, device="meta")))

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        # The class is made at run time and cannot be found by name: pickle and deepcopy start from timm's class.
        _, _, *state = super().__reduce_ex__(protocol)
        return _blank, (self._timm_class,), *state


class _Rest(nn.Module):
    """A timm model from behind one of its stages, whose features are [B, C, H, W], to the pooled [B, D].

    Args:
        net: without classifier; what comes before is taken out of it.
        stage: its dotted name.
    """

    def __init__(self, net: nn.Module, stage: str) -> None:
        super().__init__()
        self.net: Any = net
        for part in stage.split("."):
            names = list(dict(net.named_children()))
            for name in names[: names.index(part)]:
                setattr(net, name, nn.Identity())
            parent, net = net, net.get_submodule(part)
        setattr(parent, part, nn.Identity())
        self._channels_at_the_end = getattr(self.net, "output_fmt", "") == "NHWC"

    def forward(self, features: Tensor) -> Tensor:
        features = features.permute(0, 2, 3, 1) if self._channels_at_the_end else features
        return self.net.forward_head(self.net.forward_features(features), pre_logits=True)


def _on_meta(module: nn.Module) -> Any:
    """The same, without values: what runs it costs nothing."""
    return deepcopy(module).to("meta").eval()


@cache
def _with_stage_features(timm_class: type) -> type:
    # A subclass and not a wrapping module, so that the keys of the state_dict stay timm's; and not a method bound to
    # the instance, which pickle could not restore.
    return type(timm_class.__name__, (_StageFeatures, timm_class), {"_timm_class": timm_class})


def _blank(timm_class: type) -> nn.Module:
    subclass: Any = _with_stage_features(timm_class)
    return subclass.__new__(subclass)
