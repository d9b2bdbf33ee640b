"""`dalikd probe`: train a linear classifier on a frozen net's features."""

from collections.abc import Sequence
from typing import Any

from dalikd.tools.cli import run_command
from dalikd.tools.summary import print_training
from dalikd.trainers.launch import start
from dalikd.trainers.run import run
from dalikd.trainers.tasks.probe import ProbeOptions


def probe(options: ProbeOptions, config: dict[str, Any]) -> dict[str, Any]:
    """Probe a net and return the content of its results.json."""
    options = options.settled()
    net = {name: getattr(options, name) for name in ("run", "model", "model_args", "weights")}
    accelerator = start(options.device, options.precision)
    results = run(options, accelerator, "probe", {**config, **net})
    print_training(results, accelerator, options.json)
    if accelerator.is_main_process:
        last, frozen = results["last"], f"on the frozen features of {options.model}"
        print(f"linear probe: top1 {100 * last['val']['top1']:.2f} %, of a linear classifier {frozen}")
        if "knn" in last:
            print(f"k-NN: top1 {100 * last['knn']:.2f} %, of a vote of the {options.knn} nearest training images")
    return results


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    run_command("probe", probe, argv)


if __name__ == "__main__":
    main()
