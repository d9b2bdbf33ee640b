"""`dalikd report`: what came out of runs, as one page."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dalikd.pipelines.data import FilePath
from dalikd.pipelines.files import write_atomically
from dalikd.tools.cli import resolve, run_function
from dalikd.tools.layers import Layer
from dalikd.tools.summary import give_json
from dalikd.trainers.launch import start
from dalikd.trainers.report.compare import compare_runs, describe
from dalikd.trainers.report.page import Samples, page
from dalikd.trainers.runs import Found, find_runs, read_measurement
from dalikd.trainers.tracking import check_writable


def run(
    runs: list[FilePath],
    output: Path = Path("report.html"),
    measure: list[FilePath] | None = None,
    samples: int = 6,
    title: str = "",
    json: Path | None = None,
) -> dict[str, Any]:
    """Write a page about runs: ranking with intervals, T. stddev against students, curves, times, samples.

    It is one HTML file that needs neither network nor scripts.

    Args:
        runs: run folders, studies, or folders that hold runs, such as runs/demo. All are evaluated on the same images.
        output: the HTML file; one that is there is replaced.
        measure: what `dalikd measure --json FILE` wrote, where it does not lie in a folder that is named; may be
            repeated.
        samples: images of each augmentation that are shown, at most 32; 0: none.
        title: of the page; default: the folders' names.
        json: JSON file for what is compared, - for stdout: {"settings": [{"name", "parts", "runs", "stddev", "train",
            "last": {"loss": {"mean", "low", "high", "kind"}, "top1", "top5"}, "best"}, …], "teachers", "left_out",
            "output"}.
    """
    check_writable("--output", output)
    if not 0 <= samples <= 32:
        raise ValueError(f"--samples {samples}: give 0 to 32")
    found = find_runs([Path(place) for place in runs])
    found.measurements.update({Path(path): read_measurement(Path(path)) for path in measure or ()})
    names = ", ".join(Path(place).resolve().name for place in runs[:3]) + (" and others" if runs[3:] else "")
    settings, teachers = compare_runs(found)
    text = page(title or names, found, settings, teachers, _samples(found, samples))
    write_atomically(output, text.encode())
    for words in found.left_out:
        print(f"left out: {words}")
    counts = f"{len(found.runs)} runs" if len(found.runs) > 1 else "one run"
    print(f"{counts}\nwritten: {output} ({len(text.encode()) / 1e6:.2f} MB)")
    compared = {"settings": [*map(describe, settings)], "teachers": [*map(describe, teachers)]}
    content = {**compared, "left_out": found.left_out, "output": str(output)}
    give_json(json, content)
    return content


def _samples(found: Found, count: int) -> Samples:
    """Images as the first run that distils makes them, under the augmentations of all runs."""
    if count == 0:
        return Samples({}, "Not asked for (--samples 0).")
    distilled = [one for one in found.runs if one.results["command"] == "distill"]
    first = next(iter(distilled), found.runs[0])
    names = dict.fromkeys(str(one.results.get("augmentation") or "identity") for one in distilled)
    shown = [name for name in names if "manifold_mixup" not in name] or ["identity"]
    from dalikd.trainers.preview import look  # imports DALI

    try:
        given: dict[str, Any] = {name: first.config[name] for name in ("seed", "mix") if name in first.config}
        given |= {"data": {**first.config["data"], "download": False, "resident": False}, "augmentation": shown}
        given |= {"images": count, "device": "cpu", "precision": "fp32", "compile": "off"}
        options, _ = resolve("preview", [Layer("", given)])
        rows = look(options, start("cpu", "fp32")).rows
    except (ValueError, OSError) as error:
        words = " ".join(str(error).split())
        print(f"no samples: {words}")
        return Samples({}, f"Not shown, the images of {first.folder} cannot be read here: {words}")
    images: dict[str, list[np.ndarray]] = {}
    for row, name in zip(rows, ["original", *(row.title.partition(",")[0] for row in rows[1:])], strict=True):
        images.setdefault(name, [tile.image for tile in row.tiles])  # of several runs the first
    return Samples(
        images,
        f"The first images of the first epoch, as {first.folder} draws them. Augmentations that pick show candidates "
        "before picking; one that mixes inside the nets shows none.",
    )


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    run_function("report", run, argv, lists=("runs", "measure"), positional=True)


if __name__ == "__main__":
    main()
