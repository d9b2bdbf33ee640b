"""`dalikd evaluate`: loss and accuracy on every validation image."""

import math
from collections.abc import Sequence
from typing import Any

import torch

from dalikd.pipelines.data import as_used
from dalikd.tools.cli import run_command
from dalikd.tools.summary import evaluation_line, give_json
from dalikd.trainers.evaluate import EvaluateOptions, evaluate, replaced_files
from dalikd.trainers.launch import model_type, start
from dalikd.trainers.models import build_model
from dalikd.trainers.setup import open_run
from dalikd.trainers.tracking import versions


def evaluate_net(options: EvaluateOptions, config: dict[str, Any]) -> dict[str, Any]:
    """Evaluate a net, print the figures, write the JSON file, and return its content."""
    if options.model is None or options.weights is None:
        raise ValueError(
            "evaluate needs --model (the architecture) and --weights (a file, or pretrained with timm models)"
        )
    accelerator = start(options.device, options.precision)
    setup = open_run(options, accelerator, "val")
    model = build_model(
        options.model, setup.val, weights=options.weights, args=options.model_args, mean=options.mean, std=options.std
    )
    model = model.to(accelerator.device, model_type(options.precision), memory_format=torch.channels_last)  # type: ignore[call-overload]
    loader, name = setup.val_loader(), f"--model {options.model}"
    with accelerator.autocast():
        setup.check_net(model.eval(), name, options.weights, setup.val_view)
    result = evaluate({"net": model}, loader, accelerator)["net"]
    if not math.isfinite(result["loss"]):
        raise ValueError(f"{name} answers some images with NaN or infinity: --precision is too coarse for its weights")
    report = {
        **result,
        "replaced_files": replaced_files((loader,), accelerator),
        "normalisation": model.normalisation._asdict(),
        "class_names": list(setup.val.classes),  # index = label
        "fingerprint": setup.val.fingerprint,
        "config": config,
        "data": as_used(options.data, setup.val, accelerator.device),
        "versions": versions(accelerator.device),
    }
    if accelerator.is_main_process:
        print(evaluation_line(result))
        give_json(options.json, report)
    return report


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    run_command("evaluate", evaluate_net, argv)


if __name__ == "__main__":
    main()
