"""`dalikd convert`: a config of mdistiller as one of dalikd."""

from ast import literal_eval
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml

from dalikd.pipelines.files import read_yaml
from dalikd.tools.cli import run_function

_BOTH = "LOSS.CE_WEIGHT=ce_weight LOSS.FEAT_WEIGHT=weight"
#: mdistiller's methods: the loss here, and KEY=option of it
_METHODS = """
KD KD TEMPERATURE=temperature LOSS.CE_WEIGHT=ce_weight LOSS.KD_WEIGHT=kd_weight
AT AT BOTH P=p
RKD RKD BOTH DISTANCE_WEIGHT=distance_weight ANGLE_WEIGHT=angle_weight
FITNET FitNet BOTH HINT_LAYER=hint
KDSVD KDSVD BOTH K=k
OFD OFD BOTH
NST NST BOTH
PKT PKT BOTH
SP SP BOTH
VID VID BOTH INIT_PRED_VAR=init_variance
CRD CRD BOTH MODE=mode FEAT.DIM=feat_dim NCE.K=nce_k NCE.MOMENTUM=momentum NCE.TEMPERATURE=temperature
REVIEWKD ReviewKD CE_WEIGHT=ce_weight REVIEWKD_WEIGHT=weight WARMUP_EPOCHS=warmup
DKD DKD CE_WEIGHT=ce_weight ALPHA=alpha BETA=beta T=temperature WARMUP=warmup
"""
_LOSSES = {
    name: (loss, dict(pair.split("=") for pair in pairs))
    for name, loss, *pairs in map(str.split, _METHODS.replace("BOTH", _BOTH).splitlines()[1:])
}
#: keys that no run depends on here, or that follow from the nets
_LEFT_OUT = ("EXPERIMENT.", "LOG.", "DATASET.NUM_WORKERS", "DATASET.TEST.BATCH_SIZE", "FITNET.INPUT_SIZE")
_LEFT_OUT += ("VID.INPUT_SIZE", "CRD.FEAT.STUDENT_DIM", "CRD.FEAT.TEACHER_DIM", "REVIEWKD.SHAPES")
_LEFT_OUT += ("REVIEWKD.OUT_SHAPES", "REVIEWKD.IN_CHANNELS", "REVIEWKD.OUT_CHANNELS")
#: what cannot be chosen here, and its value
_FIXED = {"VID.EPS": 1e-5, "RKD.PDIST.EPSILON": 1e-12, "RKD.PDIST.SQUARED": False, "OFD.CONNECTOR.KERNEL_SIZE": 1}
_FIXED |= {"REVIEWKD.STU_PREACT": False, "REVIEWKD.MAX_MID_CHANNEL": 512}
#: what holds there where a file gives nothing
_DEFAULTS: dict[str, Any] = {
    **{"DATASET.TYPE": "cifar100", "DISTILLER.TYPE": "NONE", "DISTILLER.TEACHER": "ResNet50"},
    **{"DISTILLER.STUDENT": "resnet32", "SOLVER.TRAINER": "base", "SOLVER.TYPE": "SGD", "SOLVER.BATCH_SIZE": 64},
    **{"SOLVER.EPOCHS": 240, "SOLVER.LR": 0.05, "SOLVER.LR_DECAY_STAGES": [150, 180, 210]},
    **{"SOLVER.LR_DECAY_RATE": 0.1, "SOLVER.WEIGHT_DECAY": 1e-4, "SOLVER.MOMENTUM": 0.9},
}
_CIFAR = "resnet8 resnet14 resnet20 resnet32 resnet44 resnet56 resnet110 resnet8x4 resnet32x4 ResNet50 wrn_16_1 "
_CIFAR += "wrn_16_2 wrn_40_1 wrn_40_2 vgg8 vgg11 vgg13 vgg16 vgg19 MobileNetV2 ShuffleV1 ShuffleV2"
_IMAGENET = {f"ResNet{depth}": f"timm:resnet{depth}" for depth in (18, 34, 50, 101)}
_NETS = {"cifar100": {name: name for name in _CIFAR.split()}, "imagenet": _IMAGENET}


def convert(file: Path) -> str:
    """Print a config of mdistiller as one of dalikd. Nothing is guessed: a key or value without counterpart is named.

    Args:
        file: mdistiller's YAML file.
    """
    content = read_yaml(file)
    if not isinstance(content, dict):
        raise ValueError(f"{file} is no config of mdistiller: give one with groups of keys, such as DISTILLER")
    given = dict(_flat(content))
    there = {key: given.pop(key, default) for key, default in _DEFAULTS.items()}
    data, method, teacher, student = (there[key] for key in list(_DEFAULTS)[:4])
    loss, keys = _LOSSES.get(method, ("", {}))
    own = {name: given.pop(f"{method}.{key}") for key, name in keys.items() if f"{method}.{key}" in given}
    left = [key for key in given if key.startswith(_LEFT_OUT) or key.partition(".")[0] in {*_LOSSES} - {method}]
    left += [key for key, value in _FIXED.items() if key not in left and given.get(key) == value]
    known = {"DATASET.TYPE": _NETS, "DISTILLER.TYPE": (*_LOSSES, "NONE"), "SOLVER.TYPE": ["SGD"]}
    known |= {"DISTILLER.STUDENT": _NETS.get(data, [student]), "SOLVER.TRAINER": ("base", "crd")}
    known |= {} if method == "NONE" else {"DISTILLER.TEACHER": _NETS.get(data, [teacher])}
    unknown = [f"{key} {there[key]}" for key, values in known.items() if there[key] not in values]
    if unknown := unknown + [key for key in given if key not in left]:
        raise ValueError(f"{file}: dalikd has no counterpart of {', '.join(unknown)}: take it out or change it")
    found: dict[str, Any] = {"data": {"name": data}, "model": _NETS[data][student], "augmentation": "identity"}
    if method != "NONE":
        cifar = {"name": teacher, "weights": f"download_ckpts/cifar_teachers/{teacher}_vanilla/ckpt_epoch_240.pth"}
        imagenet = {"name": f"{_IMAGENET.get(teacher)}.tv_in1k", "weights": "pretrained"}  # torchvision's, as there
        found["teacher"] = imagenet if data == "imagenet" else cifar
    found |= {name: there[f"SOLVER.{name.upper()}"] for name in ("batch_size", "epochs")}
    settings = {name: there[f"SOLVER.{name.upper()}"] for name in ("lr", "momentum", "weight_decay")}
    found["optimizer"] = {"class_path": "torch.optim.SGD", "init_args": settings}
    steps = {"milestones": there["SOLVER.LR_DECAY_STAGES"], "gamma": there["SOLVER.LR_DECAY_RATE"]}
    found["schedule"] = {"name": "multistep", **steps}
    if "hint" in own:
        own |= {f"{net}_features": [own["hint"]] for net in ("student", "teacher")}
        del own["hint"]
    if {"warmup", "weight"} & own.keys() and method in ("REVIEWKD", "DKD"):
        rise = {"epochs": [0, own.pop("warmup", 20)], "values": [0, own.pop("weight", 1)]}
        own["weight" if method == "REVIEWKD" else "kd_weight"] = rise
    own |= {"kd_mix_share": 0.0} if method in ("KD", "DKD") else {}
    if method != "NONE":
        found["distill"] = {"loss": {"class_path": f"dalikd.kd.losses.{loss}", "init_args": own}}
    text = f"# For: dalikd {'train' if method == 'NONE' else 'distill'}. Converted from {file.name} of mdistiller.\n"
    text += f"# Not needed here: {', '.join(left)}.\n" if left else ""
    text += yaml.safe_dump(found, sort_keys=False)
    print(text, end="")
    return text


def _flat(group: dict[Any, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in group.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
            continue
        with suppress(ValueError, SyntaxError):  # 5e-4, and tuples, are text to YAML; there they are read
            value = literal_eval(value) if isinstance(value, str) else value
        yield f"{prefix}{key}", [*value] if isinstance(value, tuple) else value


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    run_function("convert", convert, argv, positional=True)


if __name__ == "__main__":
    main()
