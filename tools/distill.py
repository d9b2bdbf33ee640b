"""`dalikd distill`: distil a teacher into a student, or into several in one go."""

import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from dalikd.pipelines.files import read_yaml, remove_litter, write_atomically
from dalikd.tools.cli import resolve, run_command
from dalikd.tools.layers import Layer, grammar, nested, read_layers
from dalikd.tools.summary import give_json, print_training, students_table
from dalikd.trainers.launch import start
from dalikd.trainers.run import Planned, run, run_path, run_students
from dalikd.trainers.tasks.distill import OWN, DistillOptions
from dalikd.trainers.tracking import LOCK, RunFolder, alone, write_json


def distill(options: DistillOptions, config: dict[str, Any], words: Sequence[str] = ()) -> dict[str, Any]:
    """Distil a teacher into a student, or into those of --students; return the content of results.json.

    Args:
        options: of the command.
        config: the same as plain values.
        words: the command line, which is read again for each of several students.
    """
    if getattr(options, "students", None) is not None:
        return _distill_students(options, config, words)
    accelerator = start(options.device, options.precision)
    results = run(options, accelerator, "distill", config)
    print_training(results, accelerator, options.json)
    return results


def _distill_students(options: DistillOptions, config: dict[str, Any], words: Sequence[str]) -> dict[str, Any]:
    folder, listed = run_path(options, "distill"), options.students
    assert listed is not None
    entries, layers = read_students(Path(listed)), read_layers(words, grammar("distill"))
    RunFolder(folder, writes=False).check_new(options.overwrite or options.resume is not None)
    runs = {}
    for entry in entries:
        name = entry.pop("name")
        goes_on = options.resume is not None and RunFolder(folder / name, writes=False).has_state()
        own = {"students": None, "output": str(folder / name), "resume": str(folder / name) if goes_on else None}
        own["overwrite"] = options.overwrite or options.resume is not None  # else it has begun and saved nothing yet
        runs[name] = Planned(*resolve("distill", [*layers, Layer(f"{listed}: student {name}", nested(entry) | own)]))
    accelerator = start(options.device, options.precision)

    def begin() -> None:
        """All is checked: what --resume needs."""
        kept = {**config, "students": str(folder / "students.yaml"), "output": str(folder)}
        if not any("loss" in part for layer in layers for part in layer.parts("distill", kept)):
            del kept["loss"]  # what it is by default depends on each student
        content = Path(listed).read_bytes()
        remove_litter(folder)
        remove_litter(folder / "last")
        write_atomically(folder / "students.yaml", content)
        write_atomically(folder / "config.yaml", yaml.safe_dump(kept, sort_keys=False).encode())

    with alone([(str(folder), folder / LOCK)], accelerator):
        try:
            found = run_students(runs, accelerator, begin)
        finally:
            for name in runs if accelerator.is_main_process else ():
                weights = folder / name / "last" / "student.safetensors"
                if (folder / name / "results.json").is_file() and weights.is_file():
                    write_atomically(folder / "last" / f"{name}.safetensors", weights.read_bytes())
        results = {"students": dict(zip(runs, found, strict=True)), "folder": str(folder)}
        if accelerator.is_main_process:
            write_json(folder / "results.json", results)
    if accelerator.is_main_process:
        print(students_table(results["students"]))
        print(f"weights: {folder}/last/NAME.safetensors\nrun folders: {folder}/NAME")
        give_json(options.json, results)
    return results


def read_students(path: Path) -> list[dict[str, Any]]:
    """The students of a file: a YAML list of {name, model, seed, loss, …}; `seed` is that of their fresh weights.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is no such list, a name stands twice or is no file name, or an option is not a student's own.
    """
    if not path.is_file():
        raise FileNotFoundError(f"--students {path}: no such file")
    entries = read_yaml(path)
    if not isinstance(entries, list) or not entries or not all(isinstance(entry, dict) for entry in entries):
        raise ValueError(f"{path}: give a list of students, such as - {{name: a, model: resnet20, seed: 1}}")
    names: set[str] = set()
    own = OWN - {"output", "resume", "overwrite"} | {"name", "seed"}
    for number, entry in enumerate(entries, start=1):
        name = entry.get("name")
        if not isinstance(name, str) or not name or name != Path(name).name or name in ("last", "best"):
            raise ValueError(f"{path}: student {number} has the name {name!r}: give each one that can name a folder")
        if name in names:
            raise ValueError(f"{path}: two students have the name {name}: give each a name of its own")
        names.add(name)
        if others := sorted({str(key).partition(".")[0] for key in entry} - own):
            raise ValueError(
                f"{path}: student {name}: {others[0]} is no option of a student: all of them have it in common, give "
                f"it once, outside of this file; their own are {', '.join(sorted(own))}"
            )
        if "seed" in entry:
            entry["init_seed"] = entry.pop("seed")
    return entries


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    words = sys.argv[1:] if argv is None else argv
    run_command("distill", partial(distill, words=words), words)


if __name__ == "__main__":
    main()
