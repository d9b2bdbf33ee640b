"""`dalikd study`: does T. stddev foretell the students? Everything that the answer needs, from one config."""

import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from accelerate import Accelerator

from dalikd.tools import choose_threads
from dalikd.tools.cli import guarded, parse
from dalikd.tools.distill import distill
from dalikd.tools.evaluate import evaluate_net
from dalikd.tools.measure import measure
from dalikd.tools.study_checks import check_machine
from dalikd.tools.study_config import read_study
from dalikd.tools.study_plan import Study, make_ready
from dalikd.tools.study_report import print_plan, write_report
from dalikd.tools.train import train
from dalikd.trainers.launch import start
from dalikd.trainers.study.plan import Cell
from dalikd.trainers.study.results import check_images
from dalikd.trainers.study.run import Queue, run_cells
from dalikd.trainers.study.state import check_config, keep_config, read_result

_FUNCTIONS = {"train": train, "evaluate": evaluate_net, "measure": measure, "distill": distill}


def run(study: Study) -> None:
    """Print the plan, write the report of what there is, or do this shard's cells and then write the report."""
    check_config(study.folder, study.config)
    if study.options.dry_run:
        print_plan(study)
        return
    if study.options.report:
        if not study.folder.exists():
            raise ValueError(f"--report true: there is no study in {study.folder} yet; start it, or name its --output")
        write_report(study)
        return
    accelerator = _begin(study)
    queue = Queue(study.cells, study.folder, study.shards, study.options.share()[0])
    run_cells(queue, partial(_run_cell, study), accelerator, study.options.poll_seconds)
    _end(study, queue, accelerator)


def _begin(study: Study) -> Accelerator:
    check_machine(study.kinds)
    options, _ = parse("train", [], study.shared, study.path)
    accelerator = start(options.device, options.precision)
    if accelerator.is_main_process:
        _check_images(study)
        keep_config(study.folder, study.config)
    accelerator.wait_for_everyone()
    return accelerator


def _check_images(study: Study) -> None:
    """This machine has the images that the runs which are done have had."""
    done = {cell.name: read_result(study.folder, cell) for cell in study.every}
    if any(done.values()):
        read = enumerate(study.opened.described(), start=1)
        here = {f"data {number} of this machine ({data['data']['root']})": data for number, data in read}
        check_images({**done, **here})


def _run_cell(study: Study, cell: Cell, resumed: Path | None) -> None:
    options, config = parse(cell.command, cell.words(study.folder), study.shared, study.path)
    if resumed is not None:
        # not --resume, which would read the config.yaml that a kill may have cut off
        options = replace(options, resume=str(resumed))
    _FUNCTIONS[cell.command](options, config)
    if cell.command == "measure":
        (study.folder / cell.checkpoint).unlink(missing_ok=True)


def _end(study: Study, queue: Queue, accelerator: Accelerator) -> None:
    if not accelerator.is_main_process:
        return
    missing = queue.missing()
    if missing:
        print(f"\nthis shard is done; {len(missing)} of {len(study.cells)} runs are left to others: {missing[0]}, …")
    else:
        write_report(study)


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    with guarded("study"):
        choose_threads()
        run(make_ready(read_study(sys.argv[1:] if argv is None else argv)))


if __name__ == "__main__":
    main()
