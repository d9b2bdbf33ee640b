"""`dalikd replay`: run the step again at which a training run stopped being finite."""

import math
import sys
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from dalikd.tools.cli import resolve, run_function
from dalikd.tools.layers import Layer, nested
from dalikd.tools.summary import give_json
from dalikd.trainers.launch import Device, Precision, start
from dalikd.trainers.replay import read_step, run_again, unpack_files

_SHOWN_IMAGES = 4


def replay(
    file: Path, device: Device = "auto", precision: Precision | None = None, json: Path | None = None
) -> dict[str, Any]:
    """Run a step again that a diverged run has written down, and print what is first not finite in it.

    Exit code 1 if it is not finite again, 0 if it is.

    Args:
        file: nan-stepN.pt of the run folder. It holds images, draws, nets and options: nothing else is needed, but for
            a teacher cache, which must lie where it lay, and pretrained weights, which are fetched.
        device: auto takes the GPU where there is one.
        precision: another one than the run's: fp64 tells whether rounding is to blame.
        json: JSON file for what was found, - for stdout; a term that is not finite is null in it.
    """
    content = read_step(file)
    with TemporaryDirectory(prefix="dalikd-replay-") as folder:
        given = unpack_files(content, Path(folder))
        command = given.pop("command")
        given |= {"device": device, "precision": precision or given["precision"]}
        options, _ = resolve(command, [Layer("", nested(given))])
        accelerator = start(options.device, options.precision)
        names = [path for part in content["batches"] for path in part["paths"]]
        more = f" and {len(names) - _SHOWN_IMAGES} more" if len(names) > _SHOWN_IMAGES else ""
        print(
            f"step {content['step']} of dalikd {command}, where {content['words']}; on {accelerator.device.type}, "
            f"{options.precision}, from the weights of step {content['state']['step']}\n"
            f"images      {', '.join(names[:_SHOWN_IMAGES])}{more}",
            flush=True,
        )
        found = run_again(content, options, accelerator)
    terms, end = found["terms"], "it is finite" if found["finite"] else "it is not finite again"
    print(
        *(f"{name:<12}{value:.6g}" for name, value in terms.items()),
        f"forward     first not finite: {found['forward'] or 'nothing'}",
        f"gradients   first not finite: {found['gradients'] or 'nothing'}",
        f"the step    {found['weights'] or 'leaves finite weights'}\n{end}",
        sep="\n",
    )
    finite = {"terms": {name: value if math.isfinite(value) else None for name, value in terms.items()}}
    of = {"command": command, "step": content["step"], "device": accelerator.device.type}
    give_json(json, {**of, "precision": options.precision, "images": names, **found, **finite})
    if not found["finite"]:
        sys.exit(1)
    return found


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    run_function("replay", replay, argv, positional=True)


if __name__ == "__main__":
    main()
