"""One of the processes that `bench scaling` starts: torchrun … -m dalikd.tools.bench.scaling_worker FILE [options].

Measures a round of steps on real data, one on kept batches, and one on kept batches without exchanging gradients; the
main process writes what all of them found to FILE.
"""

import sys
from pathlib import Path
from typing import Any

import torch

from dalikd.tools.bench.rounds import keep_batches, replayed, step_round, training_loop, warm_up, with_weights
from dalikd.tools.bench.training import ScalingOptions
from dalikd.tools.cli import run_command
from dalikd.trainers.launch import start
from dalikd.trainers.setup import build_distillation
from dalikd.trainers.tracking import write_json

__all__ = ["main", "work"]


def work(options: ScalingOptions, file: Path) -> dict[str, Any]:
    """Measure once and, on the main process, write.

    Returns:
        "processes", "torch_threads", "images_per_second" and "wait_share" on real data, and seconds a step on kept
        batches "with_exchange" and "without_exchange" of gradients.
    """
    accelerator = start(options.device, options.precision)
    task, data = build_distillation(with_weights(options, file.parent), accelerator)
    loop = training_loop(task, data, options, accelerator)
    warm_up(loop, options.warmup)
    kept = replayed(keep_batches(loop.loader))
    real = step_round(loop, loop.loader.next, options.steps, options.warmup)
    loop.loader.close()
    exchanging = step_round(loop, kept, options.steps, options.warmup)
    with accelerator.no_sync(loop.model):  # the processes' weights part here, so nothing may follow
        silent = step_round(loop, kept, options.steps, options.warmup)
    found = {
        "processes": accelerator.num_processes,
        "torch_threads": torch.get_num_threads(),
        "images_per_second": real.rate,
        "wait_share": real.wait_share,
        "with_exchange": exchanging.seconds / options.steps,
        "without_exchange": silent.seconds / options.steps,
    }
    if accelerator.is_main_process:
        write_json(file, found)
    accelerator.end_training()
    return found


def main() -> None:
    """The command line."""
    file, *words = sys.argv[1:]
    run_command("bench scaling", lambda options, _: work(options, Path(file)), words)


if __name__ == "__main__":
    main()
