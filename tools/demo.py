"""`dalikd demo`: teacher, measure, students, ranking, on handwritten digits, in minutes."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dalikd import configs
from dalikd.pipelines.data import FilePath
from dalikd.tools import choose_threads, correlate
from dalikd.tools.cli import parse, run_function
from dalikd.tools.distill import distill
from dalikd.tools.measure import measure
from dalikd.tools.summary import next_steps, ranking_table
from dalikd.tools.train import train
from dalikd.trainers.augmentation import augmentation_names
from dalikd.trainers.launch import Device, Precision
from dalikd.trainers.tracking import RunFolder, write_json

STUDENTS = ["identity", "cutout", "autoaugment", "mixup", "cutmix", "cutmixpick_teacher"]


def run(
    output: Path = Path("runs/demo"),
    augmentation: list[str] = STUDENTS,
    limit: int | None = None,
    device: Device = "auto",
    precision: Precision = "fp32",
    overwrite: bool = False,
) -> dict[str, Any]:
    """Train a teacher on handwritten digits, measure all nine augmentations, distil students with several, rank them.

    Args:
        output: folder of everything that is written.
        augmentation: those a student is distilled with, at least three.
        limit: use only so many training images, at least 320: quicker, and less telling.
        device: auto takes the GPU where there is one.
        precision: fp32, tf32, bf16, fp16 or fp64.
        overwrite: replace an earlier demo in the folder.
    """
    if len(augmentation_names(augmentation)) < 3:
        raise ValueError("--augmentation: name at least three, a correlation needs as many points")
    if limit is not None and limit < 1:
        raise ValueError(f"--limit {limit}: give at least 320")
    if (output / "points.json").exists() and not overwrite:
        raise ValueError(
            f"{output} holds a demo: name another folder with --output, or replace it with --overwrite true"
        )
    RunFolder(output / "teacher", writes=False).check_new(overwrite)
    common = ["--config", str(Path(configs.__file__).with_name("demo.yaml"))]
    common += ["--device", device, "--precision", precision]
    common += [] if limit is None else ["--data.limit", str(limit)]
    redo = ["--overwrite", str(overwrite).lower()]

    choose_threads()
    print("1. a teacher", flush=True)
    teacher = train(*parse("train", [*common, "--output", str(output / "teacher"), *redo]))
    weights = ["--teacher.weights", str(output / "teacher/last" / teacher["evaluated"])]
    print("\n2. how good each augmentation is, by the teacher alone", flush=True)
    measured = measure(*parse("measure", [*common, *weights, "--json", str(output / "measure.json")]))
    stddev = {result["augmentation"]: result["stddev"] for result in measured["results"]}
    if None in stddev.values():
        raise ValueError(f"--limit {limit} fills less than two windows of teacher outputs: give at least 320")
    points = []
    for number, name in enumerate(augmentation_names(augmentation), start=1):
        print(f"\n3.{number} a student with {name}", flush=True)
        arguments = [*common, *weights, "--augmentation", name, "--output", str(output / name), *redo]
        val = distill(*parse("distill", arguments))["last"]["val"]
        points.append({"da": name, "t_stddev": stddev[name], "s_test_loss": val["loss"], "top1": val["top1"]})
    write_json(output / "points.json", {"points": points})
    print(f"\n4. the ranking, best student first\n{ranking_table(points)}\n")
    result = correlate.run(
        [FilePath(str(output / "points.json"))],
        plot=output / "scatter.png",
        json=output / "correlation.json",
        title="digits",
    )
    print(next_steps(output))
    return {"points": points, **result}


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    run_function("demo", run, argv, lists=("augmentation",))


if __name__ == "__main__":
    main()
