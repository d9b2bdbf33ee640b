"""`dalikd measure`: T. stddev of one or many augmentations."""

from collections.abc import Sequence
from typing import Any

from dalikd.tools.cli import run_command
from dalikd.tools.summary import give_json
from dalikd.trainers.launch import start
from dalikd.trainers.measure import MeasureOptions, measure_all, results_table


def measure(options: MeasureOptions, config: dict[str, Any]) -> dict[str, Any]:
    """Measure, print the table, write the JSON file, and return its content."""
    accelerator = start(options.device, options.precision)
    report = {**measure_all(options, accelerator), "config": config}
    if accelerator.is_main_process:
        print(results_table(report["results"]))
        print(
            f"T. stddev over windows of {report['window']} teacher outputs, {report['results'][0]['images']} images "
            f"({report['epochs']} epoch(s) of {report['data']['images']} at most), {report['mode']}, mix group "
            f"{report['mix_group']}; lower is better."
        )
        if report["heads"]:
            print(
                "heads: of joint labels of class and turn, over the same images in all four quarter turns; compare "
                "augmentations within a column"
            )
        if report["student_weights"]:
            print(f"student: {report['student']}, weights: {report['student_weights']}")
        print(comparison(report))
        if report["replaced_files"]:
            print(f"{len(report['replaced_files'])} images could not be decoded, and others stood in for them")
        give_json(options.json, report)
    return report


def comparison(report: dict[str, Any]) -> str:
    """What the windows that all augmentations have in common say of their ranking."""
    found, stopped = report["separation"], report["stopped"]
    lines, window, first = [], report["window"], report["results"][0]
    if first["stddev"] is None:
        lines.append(
            f"T. stddev needs two windows of {window} teacher outputs ({window} originals and their augmented images); "
            f"{first['images']} originals filled {first['windows']}: raise --epochs, or lower --window"
        )
    if found is not None:
        level = stopped["confidence"] if stopped else report["confidence"]
        open_pairs = [f"{pair['a']} / {pair['b']}" for pair in found["pairs"] if not pair["separated"]]
        told = len(found["pairs"]) - len(open_pairs)
        lines.append(
            f"{told} of {len(found['pairs'])} neighbours in the ranking are told apart at {level:.0%} confidence"
            + (f"; not: {', '.join(open_pairs)}" if open_pairs else "")
        )
    if stopped is not None:
        ended = "settled after" if stopped["settled"] else "not settled within"
        lines.append(f"ranking {ended} {stopped['images']} images ({stopped['windows']} windows)")
    return "\n".join([*lines, *(f"entropies: {path}" for path in report["entropy_plots"])])


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    run_command("measure", measure, argv)


if __name__ == "__main__":
    main()
