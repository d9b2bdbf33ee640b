"""`dalikd distill`: distil a teacher into a student."""

from collections.abc import Sequence
from typing import Any

from dalikd.tools.cli import run_command
from dalikd.tools.report import print_training
from dalikd.trainers.launch import start
from dalikd.trainers.run import run
from dalikd.trainers.tasks.distill import DistillOptions


def distill(options: DistillOptions, config: dict[str, Any]) -> dict[str, Any]:
    """Distil a teacher into a student and return the content of its results.json."""
    accelerator = start(options.device, options.precision)
    results = run(options, accelerator, "distill", config)
    print_training(results, accelerator)
    return results


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    run_command("distill", distill, argv)


if __name__ == "__main__":
    main()
