"""Batch normalisation of a frozen net, folded into the convolutions before it: the same outputs from fewer passes.

In eval mode a batch norm is one scale and one shift a channel, and so is its product with the convolution that feeds
it. That needs a convolution whose output goes nowhere else; a symbolic trace of the net finds those.
"""

import warnings
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from dalikd.kd.backbones.auxiliary import AuxiliaryNet

__all__ = ["fold_batch_norms"]

_Pair = tuple[str, str]  # module paths of a convolution and of the batch norm behind it

_MOST_BRANCHES = 64  # paths through a net with conditions on its input
_ENTRIES = ("forward", "outputs", "preactivations")  # what a folded net must still answer to


def fold_batch_norms(model: nn.Module) -> int:
    """Fold each BatchNorm2d that alone follows a Conv2d into it, in place; nn.Identity takes the norm's place.

    What the net returns stays the same up to rounding, stage features included; everything else in its state_dict
    keeps its name. Only norms in eval mode with running statistics are folded. The arithmetic is float64, whatever
    the parameters' type.

    Args:
        model: a frozen net that nobody else trains or saves, in eval mode.

    Returns:
        how many batch norms were folded. 0, with one warning, where the net cannot be traced.
    """
    if not any(_foldable_norm(module) for module in model.modules()):
        return 0
    if isinstance(model, AuxiliaryNet):  # net and heads meet in stages' outputs alone
        return fold_batch_norms(model.backbone) + fold_batch_norms(model.auxiliary_classifier)
    try:
        graphs = [graph for entry in _ENTRIES if hasattr(model, entry) for graph in _graphs(model, entry)]
    except Exception as error:  # a trace runs the net's own code on stand-ins, which may fail in any way
        reason = str(error).partition("\n")[0]
        warnings.warn(
            f"{type(model).__name__} keeps its batch norms, which is slower and nothing else: it cannot be traced "
            f"({type(error).__name__}: {reason}); --teacher.fold_bn false says so without a warning",
            stacklevel=2,
        )
        return 0
    pairs = _pairs_of_all(model, graphs)
    for conv, norm in pairs:
        _fold(model, conv, norm)
    return len(pairs)


class _BranchTracer(fx.Tracer):
    """Traces one path through a net: conditions on the input get the answers given, then True.

    Args:
        entry: the method that is traced.
        answers: to the first conditions.
    """

    def __init__(self, entry: str, answers: list[bool]) -> None:
        super().__init__()
        self.traced_func_name = entry
        self._answers = iter(answers)
        self.answered: list[bool] = []

    def to_bool(self, obj: fx.Proxy) -> bool:  # noqa: ARG002
        answer = next(self._answers, True)
        self.answered.append(answer)
        return answer


def _graphs(model: nn.Module, entry: str) -> Iterator[fx.Graph]:
    """One graph for each path: a net may treat images of different sides differently."""
    waiting: list[list[bool]] = [[]]
    for _ in range(_MOST_BRANCHES):
        answers = waiting.pop()
        tracer = _BranchTracer(entry, answers)
        yield tracer.trace(model)
        first_free = len(answers)
        waiting += [[*tracer.answered[:place], False] for place in range(first_free, len(tracer.answered))]
        if not waiting:
            return
    raise ValueError(f"more than {_MOST_BRANCHES} paths lead through {entry}")


def _pairs_of_all(model: nn.Module, graphs: list[fx.Graph]) -> list[_Pair]:
    """The pairs that hold on every path that meets one of the two modules."""
    found = [_pairs(model, graph) for graph in graphs]
    called = [{node.target for node in graph.nodes if node.op == "call_module"} for graph in graphs]
    return [
        pair
        for pair in dict.fromkeys(pair for pairs in found for pair in pairs)
        if all(pair in pairs or names.isdisjoint(pair) for pairs, names in zip(found, called, strict=True))
    ]


def _pairs(model: nn.Module, graph: fx.Graph) -> list[_Pair]:
    """Convolutions and norms that are called once, one straight after the other, with nobody else listening."""
    modules = dict(model.named_modules())
    calls = [node for node in graph.nodes if node.op == "call_module"]
    times = Counter(node.target for node in calls)
    # a parameter that is read beside the calls of its module must not change
    read = {str(node.target).rpartition(".")[0] for node in graph.nodes if node.op == "get_attr"}
    pairs = []
    for node in calls:
        feeder = node.args[0] if node.args else None
        if not isinstance(feeder, fx.Node) or feeder.op != "call_module" or len(feeder.users) != 1:
            continue
        pair = (str(feeder.target), str(node.target))
        once = all(times[name] == 1 and name not in read for name in pair)
        if once and _foldable_conv(modules[pair[0]]) and _foldable_norm(modules[pair[1]]):
            pairs.append(pair)
    return pairs


def _foldable_conv(module: nn.Module) -> bool:
    return type(module) is nn.Conv2d and _without_hooks(module)


def _foldable_norm(module: nn.Module) -> bool:
    if type(module) is not nn.BatchNorm2d or module.training or not _without_hooks(module):
        return False
    return module.running_mean is not None and module.running_var is not None


def _without_hooks(module: nn.Module) -> bool:
    # somebody listens to this module, or makes its weight anew before each call (weight norm)
    return not module._forward_hooks and not module._forward_pre_hooks


@torch.no_grad()
def _fold(model: nn.Module, conv_name: str, norm_name: str) -> None:
    conv, norm = model.get_submodule(conv_name), model.get_submodule(norm_name)
    assert isinstance(conv, nn.Conv2d)
    assert isinstance(norm, nn.BatchNorm2d)
    weight, bias = fuse_conv_bn_weights(
        conv.weight.double(), _double(conv.bias), _double(norm.running_mean), _double(norm.running_var), norm.eps,
        _double(norm.weight), _double(norm.bias),
    )  # fmt: skip
    # new parameters: another module may share the old ones. empty_like keeps the memory format.
    trained = conv.weight.requires_grad
    conv.weight = nn.Parameter(torch.empty_like(conv.weight).copy_(weight), trained)
    conv.bias = nn.Parameter(bias.to(conv.weight.dtype), trained)
    _replace(model, norm, nn.Identity())


def _replace(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Under every name it has: a trace knows a module by the first of them only."""
    for parent in model.modules():
        for name, child in parent._modules.items():
            if child is old:
                setattr(parent, name, new)


def _double(values: torch.Tensor | None) -> Any:
    return None if values is None else values.double()
