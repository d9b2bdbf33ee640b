"""README's benchmark table, made out of docs/benchmarks/*.json.

python -m dalikd.tools.bench.tables                   rewrites what stands between the two marks
python -m dalikd.tools.bench.tables --check true      fails where it is not up to date
"""

from collections.abc import Sequence
from pathlib import Path

from dalikd.tools.bench.record import Record, is_summary, load, number, table
from dalikd.tools.cli import run_function

__all__ = ["main", "medians", "render", "run"]

_ROOT = Path(__file__).parents[2]
_BEGIN, _END = "<!-- benchmarks -->", "<!-- /benchmarks -->"


def run(readme: Path = _ROOT / "README.md", benchmarks: Path = _ROOT / "docs/benchmarks", check: bool = False) -> None:
    """Write the newest record of each benchmark and device into the README, between its two marks.

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
    tables = render(newest(benchmarks), readme.parent)
    wanted = before + _BEGIN + (f"\n\n{tables}\n\n" if tables else "\n") + _END + after
    if check and wanted != text:
        raise ValueError(f"{readme} is not up to date: run python -m dalikd.tools.bench.tables")
    if not check and wanted != text:
        readme.write_text(wanted, "utf-8")


def newest(folder: Path) -> dict[Path, Record]:
    """The newest record of each benchmark, variant and device, by its file; ordered by these three."""
    found: dict[tuple[str, str, str], tuple[Path, Record]] = {}
    for path in sorted(folder.glob("*.json")):
        record = load(path)
        if record is None:  # not written by `record.write`
            continue
        key = (record.benchmark, record.variant, record.device)
        if key not in found or _time(record) >= _time(found[key][1]):
            found[key] = path, record
    return dict(found[key] for key in sorted(found))


def render(records: dict[Path, Record], root: Path) -> str:
    """A table of one line for each record: what was measured, the medians of what its plot shows, where and when.

    Args:
        records: by file.
        root: folder that links start from.
    """
    return table([_line(path, record, root) for path, record in records.items()]) if records else ""


def _line(path: Path, record: Record, root: Path) -> dict[str, str]:
    environment = record.environment
    link = path.with_suffix(".md").absolute().relative_to(root.absolute()).as_posix()
    where = f"{environment['cpu']}, {environment['cores_available']} cores"
    where = where if environment["device"].startswith("CPU") else f"{environment['device']}, {where}"
    return {
        "what": f"[{record.title}]({link})",
        "medians": f"{'; '.join(medians(record))} {record.plotted}",
        "where, when": f"{where}, {environment['date']}",
    }


def medians(record: Record) -> list[str]:
    """What a record's plot shows, row by row: "NAME: MEDIAN"."""
    shown = [row for row in record.rows if is_summary(row.get(record.plotted))]
    names = [", ".join(str(row[label]) for label in record.labels) for row in shown]
    return [f"{name}: {number(row[record.plotted]['median'])}" for name, row in zip(names, shown, strict=True)]


def _time(record: Record) -> str:
    return record.environment["time"]


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    run_function("bench tables", run, argv)


if __name__ == "__main__":
    main()
