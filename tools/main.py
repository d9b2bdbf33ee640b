"""`dalikd COMMAND`: finds the command's file and hands over."""

import importlib
import sys
from importlib.metadata import PackageNotFoundError, version

from dalikd.pipelines.hardware import package_versions
from dalikd.trainers.signals import EXIT_CODES, quiet_without_reader

__all__ = ["main"]

COMMANDS = {
    "demo": "the whole job on handwritten digits, in minutes: start here",
    "doctor": "look at the installation, or at every image of a data set, and name what is to be mended first",
    "preview": "draw a data set's images under each augmentation, with the teacher's answers and the picks framed",
    "prepare": "write a data set into webdataset tars or TFRecords, which are read sequentially",
    "train": "train a net on labels: a teacher, or a baseline",
    "distill": "distil a teacher into a student",
    "mutual": "train several nets together that imitate each other",
    "probe": "train a linear classifier on a frozen net's features, for other images; k-NN beside it",
    "methods": "list the distillation losses: papers, default weights, what they need, configs that use them",
    "recipes": "list the configs that are installed, which --config takes by name",
    "study": "the whole comparison: train, measure and distil pairs of nets with every augmentation",
    "measure": "measure how good augmentations are for distillation (T. stddev)",
    "report": "show runs, a study or a folder of runs as one HTML page: ranking, curves, times, samples",
    "correlate": "correlate T. stddev with students' test loss, and plot",
    "convert": "turn a config of mdistiller into one of dalikd",
    "cache": "write down what the teacher says, for many runs of distill; verify it",
    "evaluate": "evaluate a net on every validation image",
    "export": "give the student alone away: safetensors with a model card, ONNX, torch.export; to the Hugging Face Hub",
    "replay": "run the step again at which a training run diverged, and name what is first not finite",
    "bench": "measure speed: loader, training step, teacher, several processes",
}


@quiet_without_reader()
def main() -> None:
    """Run `dalikd COMMAND …`; each command is also `python -m dalikd.tools.COMMAND`."""
    command = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if command in ("-h", "--help"):
        print("usage: dalikd COMMAND [options]\n\ncommands:")
        print("\n".join(f"  {name:<10} {text}" for name, text in COMMANDS.items()))
        print("\nexit codes:")
        print("\n".join(f"  {code:<4} {text}" for code, text in EXIT_CODES.items()))
        print("\ndalikd COMMAND --help explains every option of a command. dalikd --version says what is installed.")
        return
    if command == "--version":
        print(_versions())
        return
    if command not in COMMANDS:
        print(f"dalikd: error: unknown command {command}; there are {', '.join(COMMANDS)}", file=sys.stderr)
        sys.exit(2)
    importlib.import_module(f"dalikd.tools.{command}").main(sys.argv[2:])


def _versions() -> str:
    """Of the package and of what it stands on, without importing any of them."""
    numbers = {"dali": "not installed", **package_versions()}
    for package in ("dalikd", "torch"):
        try:
            numbers[package] = version(package)
        except PackageNotFoundError:
            numbers[package] = "not installed"
    if "torch_cuda" in numbers:
        numbers["torch"] += f" (CUDA {numbers['torch_cuda']})"
    names = {"dalikd": "dalikd", "torch": "torch", "dali": "DALI", "nvimgcodec": "nvImageCodec", "driver": "driver"}
    return ", ".join(f"{name} {numbers[key]}" for key, name in names.items() if key in numbers)
