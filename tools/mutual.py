"""`dalikd mutual`: train several nets together that imitate each other."""

from collections.abc import Sequence
from typing import Any

from dalikd.tools.cli import run_command
from dalikd.tools.report import print_training
from dalikd.trainers.launch import start
from dalikd.trainers.run import run
from dalikd.trainers.tasks.mutual import MutualOptions


def mutual(options: MutualOptions, config: dict[str, Any]) -> dict[str, Any]:
    """Train nets that imitate each other and return the content of their results.json."""
    accelerator = start(options.device, options.precision)
    results = run(options, accelerator, "mutual", config)
    print_training(results, accelerator)
    return results


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    run_command("mutual", mutual, argv)


if __name__ == "__main__":
    main()
