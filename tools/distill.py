"""`dalikd distill`: distil a teacher into a student."""

from collections.abc import Sequence
from typing import Any

from dalikd.kd.teacher import Teacher
from dalikd.tools.cli import run_command
from dalikd.tools.report import print_training
from dalikd.trainers.assembly import build_student, open_training_data, run_training
from dalikd.trainers.distill import Distillation
from dalikd.trainers.launch import autocast_type, model_type, start
from dalikd.trainers.models import build_teacher
from dalikd.trainers.options import DistillOptions


def distill(options: DistillOptions, config: dict[str, Any]) -> dict[str, Any]:
    """Distil a teacher into a student and return the content of its results.json."""
    accelerator = start(options.device, options.precision)
    data = open_training_data(options, accelerator)
    kept_in = model_type(options.precision)
    teacher_net = build_teacher(options.teacher, data.train, data.val_loader.spec.view).to(kept_in)
    teacher = Teacher(teacher_net, accelerator.device, autocast_type(options.precision))
    student = build_student(options, data.train).to(kept_in)
    method = Distillation(
        student,
        teacher,
        options.loss,
        data.augmenter,
        accelerator,
        len(data.train.classes),
        joint_forward=options.joint_forward,
        metric=options.metric,
    )
    results = run_training(method, data, options, accelerator, "distill", config)
    print_training(results, accelerator)
    return results


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    run_command("distill", distill, argv)


if __name__ == "__main__":
    main()
