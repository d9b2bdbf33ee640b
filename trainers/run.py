"""A training run, from its options to its results. All is checked before a folder is touched."""

from pathlib import Path
from typing import Any

from accelerate import Accelerator

from dalikd.pipelines.data import as_used
from dalikd.trainers.loop import Loop, parameter_groups
from dalikd.trainers.resume import identity
from dalikd.trainers.setup import Setup, open_run
from dalikd.trainers.tasks.base import Task, TrainingOptions
from dalikd.trainers.tracking import RunFolder
from dalikd.trainers.trial import try_training

__all__ = ["run"]


def run(options: TrainingOptions, accelerator: Accelerator, command: str, config: dict[str, Any]) -> dict[str, Any]:
    """Build the options' task and train it, from the start or from a resumed folder; write the run folder.

    Args:
        options: of the run.
        accelerator: its device and processes.
        command: its name in the run folder.
        config: the same options as plain values.

    Returns:
        the content of results.json, with "folder".

    Raises:
        ValueError, OSError: the options, the data, the nets or the folder are not as they should be.
    """
    options.check_machine(accelerator)
    folder = _free_folder(options, accelerator, command)
    setup = open_run(options, accelerator)
    setup.sampler(accumulation=options.accumulation)  # the batch size fits: found before nets are opened
    task = options.build(setup)
    loader, val_loader = task.loader(setup, options.accumulation), setup.val_loader()
    data = {
        **as_used(options.data, setup.source, accelerator.device),
        "train_images": len(setup.source),
        "val_images": len(setup.val),
    }
    student = next(iter(task.nets.values()))
    header = {
        "command": command,
        "seed": options.seed,
        "model": options.model,
        "normalisation": student.normalisation._asdict(),
        "augmentation": options.augmentation,
        "mode": options.mix.mode,
        "mix_group": options.mix.group,
        "window": 640,
        "batch_size": options.batch_size,
        "precision": options.precision,
        "data": data,
        "class_names": list(setup.source.classes),  # index = label
        "fingerprint": {"train": setup.source.fingerprint, "val": setup.val.fingerprint},
        **task.header,
    }
    told = dict(task.told)
    if setup.source.arrays is None:
        decoder = "the GPU, --data.hw_decoder_load {hw_decoder_load}, {decode}".format(**data)
        told["images are decoded by"] = "the CPU" if accelerator.device.type == "cpu" else decoder
    _try_training(task, setup, options)
    saved_with = identity(command, config, told, **task.contents)
    loop = Loop(task, loader, val_loader, options, accelerator, folder, header, saved_with)
    if options.resume is not None:
        loop.load()
    folder.start(config, loop.progress.step if options.resume is not None else None)
    accelerator.wait_for_everyone()
    results = loop.run()
    if accelerator.is_main_process:
        task.finish(folder.path)
    return {**results, "folder": str(folder.path)}


def _free_folder(options: TrainingOptions, accelerator: Accelerator, command: str) -> RunFolder:
    if options.resume and options.output and Path(options.output).resolve() != Path(options.resume).resolve():
        raise ValueError(
            f"--resume {options.resume} goes on in that folder, not in --output {options.output}: leave --output out, "
            "or copy the folder and resume the copy"
        )
    path = Path(options.resume or options.output or f"runs/{command}-{options.data.name}-{options.model}")
    folder = RunFolder(path, accelerator.is_main_process)
    if options.resume is None:
        folder.check_new(options.overwrite)
    return folder


def _try_training(task: Task, setup: Setup, options: TrainingOptions) -> None:
    """Each net does a step on blank images."""
    for name, net in task.nets.items():
        try_training(
            net,
            lambda copy: options.optimizer(parameter_groups(copy, options.no_decay_norms)),
            f"--model {options.model}" if len(task.nets) == 1 else f"the net {name}",
            setup.view.size,
            len(setup.source.classes),
            setup.accelerator,
        )
