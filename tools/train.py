"""`dalikd train`: train a net on labels; `dalikd mutual`: train several that imitate each other."""

from collections.abc import Sequence
from typing import Any

from dalikd.tools.cli import run_command
from dalikd.tools.summary import print_training
from dalikd.trainers.launch import start
from dalikd.trainers.run import run
from dalikd.trainers.tasks.supervised import TrainOptions


def train(options: TrainOptions, config: dict[str, Any], command: str = "train") -> dict[str, Any]:
    """Train a net on labels, or several together, and return the content of results.json."""
    accelerator = start(options.device, options.precision)
    results = run(options, accelerator, command, config)
    print_training(results, accelerator, options.json)
    return results


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    run_command("train", train, argv)


if __name__ == "__main__":
    main()
