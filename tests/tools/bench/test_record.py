"""What is written of a benchmark, and README's table of it."""

import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from dalikd.tools.bench import main, tables
from dalikd.tools.bench.record import Record, alternate, begin, load, markdown, ratio, summary, table, write

ROOT = Path(__file__).parents[3]
README = "# x\n\nbefore\n\n<!-- benchmarks -->\nold\n<!-- /benchmarks -->\n\nafter\n"
ENVIRONMENT = {
    "date": "2031-02-03",
    "time": "2031-02-03T04:05:06Z",
    "device": "CPU, 2 cores",
    "cpu": "Some CPU",
    "cores_available": 2,
    "memory_gib": 7.6,
    "load_average": [0.25, 0.5, 1.0],
    "commit": "abc",
    "python": "3.11.7",
    "torch": "2.15.0",
    "torchvision": "0.29.2",
    "nvidia-dali-cuda120": "2.4.0",
}


def _record(**changes):
    rows = [
        {"source": "files", "loader": "ours", "images/s": summary([990.0, 1010.0, 1000.0]), "this / ours": None},
        {"source": "files", "loader": "theirs", "images/s": summary([98.0, 105.0, 100.0]), "this / ours": 0.1},
    ]
    title, labels, notes = "What was measured", ("source", "loader"), ["A note."]
    fields = {"title": title, "rows": rows, "labels": labels, "plotted": "images/s", "notes": notes, "config": {"x": 3}}
    more = {"warm_up": "one round.", "page_cache": "warm.", "command": "dalikd bench loader"}
    return Record(**{"benchmark": "loader", "environment": ENVIRONMENT, **fields, **more, **changes})


# ------------------------------------------------------------------------------------------------ measuring


def test_summary_and_ratio_have_median_and_range():
    """Of finite numbers, and round by round."""
    found = {"median": 2.5, "low": 1.0, "high": 10.0, "repetitions": 4, "values": [3.0, 1.0, 2.0, 10.0]}
    assert summary([3, 1, 2, 10]) == found
    assert ratio([10.0, 30.0, 20.0], [5.0, 10.0, 20.0])["values"] == [2.0, 3.0, 1.0]
    for values in ([], [1.0, float("nan")], [float("inf")]):
        with pytest.raises(ValueError, match="finite numbers"):
            summary(values)
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

    def started(accelerator=one, rounds=5, output=tmp_path / "new" / "folder"):
        return begin("x", SimpleNamespace(rounds=rounds, output=output), accelerator, {"path": tmp_path})

    assert started().config == {"path": str(tmp_path)}
    assert started(output=tmp_path / "new.json").environment["torch"]
    for changes, message in (
        ({"rounds": 4}, "--rounds 4: give at least 5"),
        ({"accelerator": two}, "bench x measures one process: start it without a launcher"),
        ({"output": tmp_path / "file" / "folder"}, "--output"),
    ):
        with pytest.raises(ValueError, match=message):
            started(**changes)


# --------------------------------------------------------------------------------------------------- writing


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
    text = markdown(_record(environment=environment, pictures=images))
    facts = (
        "# What was measured|Some GPU; Some CPU, 2 cores available, 8 GiB, load average 0.25|DALI 2.4.0, CUDA 13.0|abc"
    )
    more = "Warm-up: one round. Page cache: warm.|1,234, median 500 x 500 pixels, 104 kB|- A note.|1,000 (990 to 1,010)"
    assert [fact for fact in f"{facts}|{more}".split("|") if fact not in text] == []
    assert text.endswith("```bash\ndalikd bench loader\n```\n")


def test_write_names_files_after_date_benchmark_variant_and_device(tmp_path):
    record = _record(variant="photos-224")
    paths = write(record, tmp_path / "new")
    assert [path.name for path in paths] == [
        f"2031-02-03-loader-photos-224-cpu.{kind}" for kind in ("json", "md", "png")
    ]
    assert load(paths[0]) == record
    assert paths[1].read_text() == markdown(record)
    assert write(_record(rows=[{"images/s": "needs a GPU"}]), tmp_path / "x.json") == [
        tmp_path / "x.json",
        tmp_path / "x.md",
    ]


def test_rows_of_one_series_share_a_colour(tmp_path):
    rows = [{"x": name, "y": y, "v": summary([5.0, 7.0])} for name, y in (("a", "p"), ("b", "q"), ("c", "p"))]
    record = _record(rows=rows, labels=("x", "y"), plotted="v")
    path = write(record, tmp_path)[2]
    with Image.open(path) as image:
        colors = {color for _, color in image.convert("RGB").getcolors(1 << 20)}
    assert {(0x00, 0x72, 0xB2), (0xE6, 0x9F, 0x00)} <= colors
    assert (0x00, 0x9E, 0x73) not in colors


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not JSON"),
        ('{"benchmark": "x"}', "is no record"),
        ('{"benchmark": "x", "labels": [], "y": 1}', "is no record"),
    ],
)
def test_load_names_a_file_that_is_wrong_and_leaves_others_alone(tmp_path, content, message):
    (tmp_path / "x.json").write_text(content)
    with pytest.raises(ValueError, match=rf"x\.json {message}"):
        load(tmp_path / "x.json")
    (tmp_path / "x.json").write_text(json.dumps({"what": "an earlier form"}))
    assert load(tmp_path / "x.json") is None


def test_the_published_records_are_read():
    records = [load(path) for path in sorted((ROOT / "docs/benchmarks").glob("*.json"))]
    assert sum(record is not None for record in records) >= 15
    assert all(markdown(record).count("\n") > 5 for record in records if record is not None)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["/usr/bin/dalikd", "bench", "loader", "--x", "a b"], "dalikd bench loader --x 'a b'"),
        (["/r/tools/bench/__main__.py", "all"], "python -m dalikd.tools.bench all"),
    ],
)
def test_the_command_is_what_a_user_types(monkeypatch, words, expected):
    monkeypatch.setattr(sys, "argv", words)
    assert Record("x").command == expected


# --------------------------------------------------------------------------------------------- README's table


@pytest.fixture
def place(tmp_path):
    folder = tmp_path / "docs" / "benchmarks"
    _publish(folder, "2031-01-01", 100.0)
    _publish(folder, "2031-02-01", 200.0)
    _publish(folder, "2030-01-01", 300.0, variant="small")
    _publish(folder, "2030-01-01", 400.0, device="gpu")
    (folder / "2029-01-01-loader.json").write_text('{"what": "an earlier form"}')
    (tmp_path / "README.md").write_text(README)
    return tmp_path


def _publish(folder, date, rate, **changes):
    rows = [{"loader": "dalikd", "images/s": summary([rate])}, {"loader": "other", "images/s": summary([rate / 3])}]
    environment = {**ENVIRONMENT, "date": date, "time": f"{date}T00:00:00Z"}
    fields = {"variant": "photos", "rows": rows, "labels": ("loader",), "environment": environment}
    write(_record(**{**fields, **changes}), folder)


def _run(place, **options):
    tables.run(place / "README.md", place / "docs" / "benchmarks", **options)
    return (place / "README.md").read_text()


def test_the_newest_of_each_stands_between_the_marks(place):
    text = _run(place)
    assert text.startswith("# x\n\nbefore\n\n<!-- benchmarks -->\n\n| what | medians | where, when |\n")
    assert text.endswith("<!-- /benchmarks -->\n\nafter\n")
    assert re.findall(r"dalikd: (\d+); other: ([\d.]+) images/s \|", text) == [
        ("200", "66.7"),
        ("400", "133"),
        ("300", "100"),
    ]
    assert "| [What was measured](docs/benchmarks/2031-02-01-loader-photos-cpu.md) | dalikd: 200; " in text
    assert "| Some CPU, 2 cores, 2031-02-01 |" in text
    assert _run(place) == text


def test_check_fails_until_it_is_written(place):
    with pytest.raises(ValueError, match=r"not up to date: run dalikd bench tables"):
        _run(place, check=True)
    assert (place / "README.md").read_text() == README
    text = _run(place)
    assert _run(place, check=True) == text
    _publish(place / "docs" / "benchmarks", "2031-03-01", 500.0)
    with pytest.raises(ValueError, match="not up to date"):
        _run(place, check=True)


def test_marks_are_needed_and_without_records_the_place_is_empty(place, tmp_path, capsys):
    (tmp_path / "none").mkdir()
    words = ["tables", "--readme", str(place / "README.md"), "--benchmarks", str(tmp_path / "none")]
    main(words)
    assert "<!-- benchmarks -->\n<!-- /benchmarks -->" in (place / "README.md").read_text()
    (place / "README.md").write_text("nothing")
    with pytest.raises(SystemExit) as stop:
        main(words)
    assert stop.value.code == 2
    assert "lacks the marks" in capsys.readouterr().err


def test_the_published_table_is_up_to_date():
    tables.run(check=True)
