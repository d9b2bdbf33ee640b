"""The table of docs/benchmarks/README.md, made out of the JSON beside it.

dalikd bench tables                   rewrites what stands between the two marks
dalikd bench tables --check true      fails where it is not up to date
"""

from pathlib import Path

from dalikd.tools.bench.record import Record, load, medians, table

__all__ = ["run"]

_RESULTS = Path(__file__).parents[2] / "docs/benchmarks"
_BEGIN, _END = "<!-- benchmarks -->", "<!-- /benchmarks -->"


def run(readme: Path = _RESULTS / "README.md", benchmarks: Path = _RESULTS, check: bool = False) -> None:
    """Write the newest record of each benchmark and device into a document, between its two marks.

    Args:
        readme: the document.
        benchmarks: folder of the records.
        check: change nothing, and fail if the document is not up to date.
    """
    text = readme.read_text("utf-8")
    before, begin, rest = text.partition(_BEGIN)
    _, end, after = rest.partition(_END)
    if not begin or not end:
        raise ValueError(f"{readme} lacks the marks {_BEGIN} and {_END}: put them where the tables should stand")
    rows = [_row(path, record, readme.parent) for path, record in _newest(benchmarks).items()]
    wanted = before + _BEGIN + (f"\n\n{table(rows)}\n\n" if rows else "\n") + _END + after
    if check and wanted != text:
        raise ValueError(f"{readme} is not up to date: run dalikd bench tables")
    if wanted != text:
        readme.write_text(wanted, "utf-8")


def _newest(folder: Path) -> dict[Path, Record]:
    """The newest record of each benchmark, variant and device, by its file; ordered by these three."""
    found: dict[tuple[str, str, str], tuple[Path, Record]] = {}
    for path in sorted(folder.glob("*.json")):
        record = load(path)
        if record is None:  # not written by `record.write`
            continue
        key = (record.benchmark, record.variant, record.device)
        if key not in found or record.environment["time"] >= found[key][1].environment["time"]:
            found[key] = path, record
    return dict(found[key] for key in sorted(found))


def _row(path: Path, record: Record, root: Path) -> dict[str, str]:
    """What was measured, the medians of what its plot shows, where and when; links start from the folder `root`."""
    found = record.environment
    link = path.with_suffix(".md").absolute().relative_to(root.absolute()).as_posix()
    gpu = "" if found["device"].startswith("CPU") else f"{found['device']}, "
    return {
        "what": f"[{record.title}]({link})",
        "medians": f"{'; '.join(medians(record))} {record.plotted}",
        "where, when": f"{gpu}{found['cpu']}, {found['cores_available']} cores, {found['date']}",
    }
