"""What is written of a benchmark, and README's table of it."""

import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from dalikd.tools.bench import record as bench_record
from dalikd.tools.bench.record import Record, alternate, check_names, load, markdown, ratio, summary, table, write
from dalikd.tools.bench.record import write_tables as tables

ROOT = Path(__file__).parents[3]
README = "# x\n\n<!-- benchmarks -->\nold\n<!-- /benchmarks -->\n\nafter\n"
ENVIRONMENT = {
    **{"date": "2031-02-03", "time": "2031-02-03T04:05:06Z", "device": "CPU, 2 cores", "cpu": "Some CPU"},
    **{"cores_available": 2, "memory_gib": 7.6, "load_average": [0.25, 0.5, 1.0], "commit": "abc"},
    **{"python": "3.11.7", "torch": "2.15.0", "torchvision": "0.29.2", "nvidia-dali-cuda120": "2.4.0"},
}


def _record(date="2031-02-03", rate=1000.0, **changes):
    rows = [
        {"source": "files", "loader": "ours", "images/s": summary([rate - 10, rate + 10, rate]), "this / ours": None},
        {"source": "files", "loader": "theirs", "images/s": summary([rate / 10]), "this / ours": 0.1},
    ]
    title, labels, notes = "What was measured", ("source", "loader"), ["A note."]
    fields = {"title": title, "rows": rows, "labels": labels, "plotted": "images/s", "notes": notes, "config": {"x": 3}}
    environment = {**ENVIRONMENT, "date": date, "time": f"{date}T00:00:00Z"}
    more = {"warm_up": "one round.", "page_cache": "warm.", "command": "dalikd bench loader"}
    return Record(**{"benchmark": "loader", "environment": environment, **fields, **more, **changes})


def test_summary_and_ratio_have_median_and_range_round_by_round():
    found = {"median": 2.5, "low": 1.0, "high": 10.0, "repetitions": 4, "values": [3.0, 1.0, 2.0, 10.0]}
    assert summary([3, 1, 2, 10]) == found
    assert ratio([10.0, 30.0, 20.0], [5.0, 10.0, 20.0])["values"] == [2.0, 3.0, 1.0]
    with pytest.raises(ValueError, match="argument 2 is longer"):
        ratio([1.0], [1.0, 2.0])


def test_alternate_warms_up_and_rotates_who_begins():
    calls = []
    sides = {name: lambda name=name: calls.append(name) or float(len(calls)) for name in "abc"}
    values = alternate(sides, 3, before=lambda: calls.append("|"))
    assert "".join(call for call in calls if call != "|") == "abcbcacababc"
    assert "".join(calls[::2]) == "|" * 12
    # the numbers count calls; those of the first round are left out
    assert values == {"a": [12.0, 16.0, 20.0], "b": [8.0, 18.0, 22.0], "c": [10.0, 14.0, 24.0]}


def test_a_benchmark_begins_with_what_can_be_measured(tmp_path):
    """Several repetitions, one process, and a place that can be written."""
    (tmp_path / "file").write_text("")
    one, two = (SimpleNamespace(device=torch.device("cpu"), num_processes=count) for count in (1, 2))

    def started(accelerator=one, rounds=2, output=tmp_path / "new" / "folder", name="x"):
        return bench_record.begin(
            name, SimpleNamespace(rounds=rounds, output=output), accelerator, {"path": tmp_path}, plotted="s"
        )

    assert (started().config, started().plotted) == ({"path": str(tmp_path)}, "s")
    assert started(two, output=tmp_path / "new.json", name="step").environment["torch"]
    for changes, message in (
        ({"rounds": 1}, "--rounds 1: give at least 2"),
        ({"accelerator": two}, "bench x measures one process: start it without a launcher"),
        ({"output": tmp_path / "file" / "folder"}, "--output"),
    ):
        with pytest.raises(ValueError, match=message):
            started(**changes)


def test_names_are_checked():
    assert check_names("--x", ["b", "a", "b"], ("a", "b", "c")) == ["b", "a"]
    assert check_names("--x", ["all"], ("a", "b")) == ["a", "b"]
    with pytest.raises(ValueError, match=r"--x bcd is unknown: did you mean abcd\? there are abcd, z"):
        check_names("--x", ["bcd"], ("abcd", "z"))


def test_table_aligns_and_rounds():
    rows = [
        {"name": "a|b", "images/s": summary([1234.4, 999.6, 1500.0]), "share": 0.01234, "files": 1281167},
        {"name": "c", "images/s": "needs a GPU", "ratio": summary([1.0, 12.34])},
    ]
    assert table(rows).splitlines() == [
        "| name | images/s | share | files | ratio |",
        "|:--|--:|--:|--:|--:|",
        "| a\\|b | 1,234 (1,000 to 1,500) | 0.0123 | 1,281,167 |  |",
        "| c | needs a GPU |  |  | 6.67 (1.00 to 12.3) |",
    ]


def test_markdown_tells_what_the_numbers_depend_on():
    environment = {**ENVIRONMENT, "device": "Some GPU", "cuda": "13.0"}
    spread = {"mean": 1.0, "median": 500.0, "p95": 900.0}
    images = {"number": 1234, "width": spread, "height": spread, "encoded_bytes": {**spread, "median": 104_000.0}}
    text = markdown(_record(environment=environment, images=images))
    facts = (
        "What was measured|Some GPU; Some CPU, 2 cores available, 8 GiB, load average 0.25|DALI 2.4.0, CUDA 13.0|abc"
    )
    more = "Warm-up: one round. Page cache: warm.|1,234, median 500 x 500 pixels, 104 kB|- A note.|1,000 (990 to 1,010)"
    assert [fact for fact in f"# {facts}|{more}".split("|") if fact not in text] == []
    assert text.endswith("```bash\ndalikd bench loader\n```\n")


def test_files_are_named_and_read_again(tmp_path):
    record = _record(variant="photos-224")
    paths = write(record, tmp_path / "new")
    assert [path.name for path in paths] == [
        f"2031-02-03-loader-photos-224-cpu.{kind}" for kind in ("json", "md", "png")
    ]
    assert load(paths[0]) == record
    assert paths[1].read_text() == markdown(record)
    assert write(_record(rows=[{"images/s": "x"}]), tmp_path / "x.json") == [tmp_path / "x.json", tmp_path / "x.md"]
    (tmp_path / "x.json").write_text(json.dumps({"what": "an earlier form"}))
    assert load(tmp_path / "x.json") is None


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["/usr/bin/dalikd", "bench", "loader", "--x", "a b"], "dalikd bench loader --x 'a b'"),
        (["/r/tools/bench/__main__.py", "all"], "python -m dalikd.tools.bench all"),
        (["/r/__main__.py", "bench", "all"], "python -m dalikd bench all"),
    ],
)
def test_the_command_is_what_a_user_types(monkeypatch, words, expected):
    monkeypatch.setattr(sys, "argv", words)
    assert Record("x").command == expected


def test_the_newest_of_each_stands_between_the_marks(tmp_path, monkeypatch):
    for date, rate, changes in (
        ("2031-02-01", 200.0, {}),
        ("2031-01-01", 100.0, {}),
        ("2030-01-01", 300.0, {"variant": "small"}),
        ("2030-01-01", 400.0, {"device": "gpu"}),
    ):
        write(_record(date, rate, **{"variant": "photos", **changes}), tmp_path)
    (tmp_path / "2029-01-01-loader.json").write_text('{"what": "an earlier form"}')
    (tmp_path / "README.md").write_text(README)
    with pytest.raises(ValueError, match=r"not up to date: run dalikd bench tables"):
        tables(tmp_path, check=True)
    assert (tmp_path / "README.md").read_text() == README
    tables(tmp_path)
    text = (tmp_path / "README.md").read_text()
    assert text.startswith("# x\n\n<!-- benchmarks -->\n\n| what | medians | where, when |\n")
    assert text.endswith("<!-- /benchmarks -->\n\nafter\n")
    assert re.findall(r"files, ours: (\d+); files, theirs: ([\d.]+) images/s \|", text) == [
        *(("200", "20.0"), ("400", "40.0"), ("300", "30.0"))
    ]
    assert "| [What was measured](2031-02-01-loader-photos-cpu.md) | files, ours: 200; " in text
    assert "| Some CPU, 2 cores, 2031-02-01 |" in text
    tables(tmp_path, check=True)
    monkeypatch.setattr("dalikd.tools.bench.record._HEADLINES", {"loader small": "what a reader asks"})
    (tmp_path / "first.md").write_text(README)
    tables(tmp_path, readme=tmp_path / "first.md")
    headline = "| what a reader asks | files, ours: 300; files, theirs: 30.0 images/s | Some CPU, 2 cores, 2030-01-01 |"
    assert headline in (tmp_path / "first.md").read_text()
    assert "2031" not in (tmp_path / "first.md").read_text()
    (tmp_path / "README.md").write_text("nothing")
    with pytest.raises(ValueError, match="lacks the marks"):
        tables(tmp_path)


def test_the_published_records_are_read_and_their_table_is_up_to_date():
    records = [load(path) for path in sorted((ROOT / "docs/benchmarks").glob("*.json"))]
    assert sum(record is not None for record in records) >= 15
    assert all(markdown(record).count("\n") > 5 for record in records if record is not None)
    tables(check=True)
