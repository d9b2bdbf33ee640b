"""`dalikd report`: what came out of runs, as one page."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dalikd.pipelines.data import FilePath
from dalikd.pipelines.files import write_atomically
from dalikd.tools.cli import resolve, run_function
from dalikd.tools.layers import Layer
from dalikd.trainers.report.page import Samples, page
from dalikd.trainers.runs import Found, find_runs, read_measurement
from dalikd.trainers.tracking import check_writable


def run(
    runs: list[FilePath],
    output: Path = Path("report.html"),
    measure: list[FilePath] | None = None,
    samples: int = 6,
    title: str = "",
) -> None:
    """Write a page about runs: ranking with intervals, T. stddev against students, curves, times, samples.

    It is one HTML file that needs neither network nor scripts.

    Args:
        runs: run folders, studies, or folders that hold runs, such as runs/demo. All are evaluated on the same images.
        output: the HTML file; one that is there is replaced.
        measure: what `dalikd measure --json FILE` wrote, where it does not lie in a folder that is named; may be
            repeated.
        samples: images of each augmentation that are shown, at most 32; 0: none.
        title: of the page; default: the folders' names.
    """
    check_writable("--output", output)
    if not 0 <= samples <= 32:
        raise ValueError(f"--samples {samples}: give 0 to 32")
    found = find_runs([Path(place) for place in runs])
    found.measurements.update({Path(path): read_measurement(Path(path)) for path in measure or ()})
    names = ", ".join(Path(place).resolve().name for place in runs[:3]) + (" and others" if runs[3:] else "")
    text = page(title or names, found, lambda: _samples(found, samples))
    write_atomically(output, text.encode())
    for words in found.left_out:
        print(f"left out: {words}")
    counts = f"{len(found.runs)} runs" if len(found.runs) > 1 else "one run"
    print(f"{counts}\nwritten: {output} ({len(text.encode()) / 1e6:.2f} MB)")


def _samples(found: Found, count: int) -> Samples:
    """Images as the first run that distils makes them, under the augmentations of all runs."""
    if count == 0:
        return Samples({}, "Not asked for (--samples 0).")
    distilled = [one for one in found.runs if one.results["command"] == "distill"]
    first = next(iter(distilled), found.runs[0])
    names = list(dict.fromkeys(str(one.results.get("augmentation") or "identity") for one in distilled))
    from dalikd.trainers.report.samples import sample_images  # imports DALI

    try:
        command = first.results["command"]
        given: dict[str, Any] = {**first.config, "data": {**first.config["data"], "download": False}}
        options, _ = resolve(command, [Layer("", given)])
        images = sample_images(options, names, count)
    except (ValueError, OSError) as error:
        words = " ".join(str(error).split())
        print(f"no samples: {words}")
        return Samples({}, f"Not shown, the images of {first.folder} cannot be read here: {words}")
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
