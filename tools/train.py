"""`dalikd train`: train a net on labels."""

from collections.abc import Sequence
from typing import Any

from dalikd.tools.cli import run_command
from dalikd.tools.report import print_training
from dalikd.trainers.launch import model_type, start
from dalikd.trainers.options import TrainOptions
from dalikd.trainers.setup import build_student, open_training_data, run_training
from dalikd.trainers.tasks.supervised import Supervised


def train(options: TrainOptions, config: dict[str, Any]) -> dict[str, Any]:
    """Train a net on labels and return the content of its results.json."""
    accelerator = start(options.device, options.precision)
    data = open_training_data(options, accelerator)
    student = build_student(options, data.train).to(model_type(options.precision))
    task = Supervised(student, data.augmenter, options.label_smoothing)
    results = run_training(task, data, options, accelerator, "train", config)
    print_training(results, accelerator)
    return results


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    run_command("train", train, argv)


if __name__ == "__main__":
    main()
