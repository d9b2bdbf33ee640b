"""Training runs, from their options to their results. All is checked before a folder is touched."""

from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any, NamedTuple

from accelerate import Accelerator

from dalikd.pipelines.data import as_used
from dalikd.trainers.launch import start
from dalikd.trainers.loop import Loop, parameter_groups, run_together
from dalikd.trainers.resume import identity
from dalikd.trainers.setup import Setup, open_run
from dalikd.trainers.tasks.base import Task, TrainingOptions
from dalikd.trainers.tasks.distill import OWN, Distillation, share_pass
from dalikd.trainers.trackers import check_trackers
from dalikd.trainers.tracking import LOCK, RunFolder, alone, run_path
from dalikd.trainers.trial import try_training

__all__ = ["Planned", "check_shared", "run", "run_students"]


class Planned(NamedTuple):
    """A run that is to come."""

    options: TrainingOptions
    config: dict[str, Any]  # the same as plain values


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
    return _run([Planned(options, config)], accelerator, command)[0]


def run_students(
    runs: Mapping[str, Planned], accelerator: Accelerator, begin: Callable[[], None] | None = None
) -> list[dict[str, Any]]:
    """Distil several students of one teacher: loader and teacher work once a step for all of them, and each ends as it
    would in a run of its own, bit for bit.

    Args:
        runs: by the students' names, for messages; each has a folder of its own.
        accelerator: device and processes.
        begin: called by the main process once all is checked, before a folder is touched.

    Returns:
        the content of results.json of each, with "folder".

    Raises:
        ValueError: as `check_shared`; or as `run`.
    """
    check_shared(runs)
    return _run(list(runs.values()), accelerator, "distill", begin)


def check_shared(runs: Mapping[str, Planned]) -> None:
    """Raises ValueError where students differ in what those of one teacher pass have in common."""
    (first, planned), *others = runs.items()
    for name, other in others:
        for option in sorted((planned.config.keys() | other.config.keys()) - OWN - {"augmentation"}):
            was, value = planned.config.get(option), other.config.get(option)
            if was != value:
                raise ValueError(
                    f"student {name}: {option} is {value}, and {was} of {first}: students of one teacher pass have it "
                    f"in common; give it once for all of them, or distil {name} by itself"
                )


def _run(
    runs: Sequence[Planned], accelerator: Accelerator, command: str, begin: Callable[[], None] | None = None
) -> list[dict[str, Any]]:
    folders = []
    for planned in runs:
        planned.options.check_machine(accelerator)
        if accelerator.is_main_process:
            check_trackers(planned.options.trackers)
        folders.append(_free_folder(planned.options, accelerator, command))
    with alone([(str(folder.path), folder.path / LOCK) for folder in folders], accelerator) as locks:
        for folder, lock, planned in zip(folders, locks, runs, strict=False):
            folder.lock = lock
            if planned.options.resume is None:  # since the first look another call may have come to its end there
                folder.check_new(planned.options.overwrite)
        return _train(runs, folders, accelerator, command, begin)


def _train(
    runs: Sequence[Planned],
    folders: Sequence[RunFolder],
    accelerator: Accelerator,
    command: str,
    begin: Callable[[], None] | None,
) -> list[dict[str, Any]]:
    first = runs[0].options
    setup = open_run(first, accelerator)
    setup.sampler(accumulation=first.accumulation)  # the batch size fits: found before nets are opened
    tasks = [planned.options.build(setup) for planned in runs]
    if len(tasks) > 1:
        share_pass([task for task in tasks if isinstance(task, Distillation)], first.accumulation)
    loader, val_loader = tasks[0].loader(setup, first.accumulation), setup.val_loader()
    for planned, task in zip(runs, tasks, strict=True):
        _try_training(task, setup, planned.options)
    loops: list[Loop] = []
    for (options, config), task, folder in zip(runs, tasks, folders, strict=True):
        # each net's gradients have a scaler of their own
        own = start(first.device, first.precision) if loops else accelerator
        saved_with = identity(command, config, _told(task, setup), **task.contents)
        header = _header(options, task, setup, command)
        loops.append(Loop(task, loader, val_loader, options, own, folder, header, saved_with))
    _load(loops)
    if begin is not None and accelerator.is_main_process:
        begin()
    for (options, config), loop in zip(runs, loops, strict=True):
        loop.folder.start(config, None if options.resume is None else loop.progress.step, options.trackers)
        if options.resume is not None and accelerator.is_main_process:
            loop.mend()
    accelerator.wait_for_everyone()
    results = run_together(loops)
    return [{**found, "folder": str(loop.folder.path)} for found, loop in zip(results, loops, strict=True)]


def _load(loops: Sequence[Loop]) -> None:
    """Take up saved states. That of the loop that has done least comes last: loader and running figures, which they
    share, are where it stands."""
    begun = [loop for loop in loops if loop.options.resume is not None]
    fresh = deepcopy(loops[0].task.get_extra_state()) if begun else {}
    for loop in begun if len(begun) == 1 else sorted(begun, key=Loop.saved_step, reverse=True):
        loop.load()
    for loop in loops if begun else ():
        if loop.options.resume is None:
            loop.loader.seek(0)
            loop.task.set_extra_state(deepcopy(fresh))


def _header(options: TrainingOptions, task: Task, setup: Setup, command: str) -> dict[str, Any]:
    """What results.json says of a run besides the figures."""
    student = next(iter(task.nets.values()))
    data = {
        **as_used(options.data, setup.source, setup.accelerator.device),
        "train_images": len(setup.source),
        "val_images": len(setup.val),
    }
    return {
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


def _told(task: Task, setup: Setup) -> dict[str, str]:
    """What may be otherwise in a resumed run, and is said then."""
    if setup.source.arrays is not None:
        return dict(task.told)
    device = setup.accelerator.device
    data = as_used(setup.options.data, setup.source, device)
    decoder = "the GPU, --data.hw_decoder_load {hw_decoder_load}, {decode}".format(**data)
    return {**task.told, "images are decoded by": "the CPU" if device.type == "cpu" else decoder}


def _free_folder(options: TrainingOptions, accelerator: Accelerator, command: str) -> RunFolder:
    if options.resume and options.output and Path(options.output).resolve() != Path(options.resume).resolve():
        raise ValueError(
            f"--resume {options.resume} goes on in that folder, not in --output {options.output}: leave --output out, "
            "or copy the folder and resume the copy"
        )
    folder = RunFolder(run_path(options, command), accelerator.is_main_process)
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
