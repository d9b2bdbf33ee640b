import json
import sys
from pathlib import Path

import pytest

from dalikd.tools.bench.record import (
    Record,
    alternate,
    check_output,
    is_summary,
    load,
    markdown,
    ratio,
    summary,
    table,
    write,
)

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
    found = Record(
        benchmark="loader",
        title="What was measured",
        environment=ENVIRONMENT,
        device="cpu",
        config={"rounds": 3},
        warm_up="one round.",
        page_cache="warm.",
        rows=rows,
        labels=("source", "loader"),
        plotted="images/s",
        notes=["A note."],
        command="dalikd bench loader",
    )
    for name, value in changes.items():
        setattr(found, name, value)
    return found


def test_summary_has_median_and_range():
    assert summary([3, 1, 2, 10]) == {
        "median": 2.5,
        "low": 1.0,
        "high": 10.0,
        "repetitions": 4,
        "values": [3.0, 1.0, 2.0, 10.0],
    }


@pytest.mark.parametrize("values", [[], [1.0, float("nan")], [float("inf")]])
def test_summary_refuses_what_is_no_measurement(values):
    with pytest.raises(ValueError, match="finite numbers"):
        summary(values)


def test_ratio_compares_round_by_round():
    found = ratio([10.0, 30.0, 20.0], [5.0, 10.0, 20.0])
    assert found["values"] == [2.0, 3.0, 1.0]
    assert found["median"] == 2.0
    with pytest.raises(ValueError, match="argument 2 is longer"):
        ratio([1.0], [1.0, 2.0])


def test_a_cell_is_a_summary_or_not():
    assert is_summary(summary([1.0]))
    assert not any(map(is_summary, (None, 1.0, "word", {"median": 1.0})))


def test_alternate_warms_up_and_rotates_who_begins():
    calls = []
    sides = {name: lambda name=name: calls.append(name) or float(len(calls)) for name in "abc"}
    values = alternate(sides, 3, before=lambda: calls.append("|"))
    assert "".join(call for call in calls if call != "|") == "abcbcacababc"
    assert "".join(calls[::2]) == "|" * 12
    # the numbers count calls; those of the first round are left out
    assert values == {"a": [12.0, 16.0, 20.0], "b": [8.0, 18.0, 22.0], "c": [10.0, 14.0, 24.0]}


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


def test_markdown_says_what_the_numbers_depend_on():
    text = markdown(_record())
    for fact in ("# What was measured", "Some CPU, 2 cores available, 8 GiB, load average 0.25", "DALI 2.4.0", "abc"):
        assert fact in text
    for fact in ("Warm-up: one round.", "Page cache: warm.", "- A note.", "| files | ours | 1,000 (990 to 1,010) |"):
        assert fact in text
    assert text.endswith("```bash\ndalikd bench loader\n```\n")


def test_markdown_names_gpu_and_pictures():
    environment = {**ENVIRONMENT, "device": "Some GPU", "cuda": "13.0"}
    spread = {"mean": 1.0, "median": 500.0, "p95": 900.0}
    pictures = {"number": 1234, "width": spread, "height": spread, "encoded_bytes": {**spread, "median": 104_000.0}}
    text = markdown(_record(environment=environment, pictures=pictures))
    assert "Some GPU; Some CPU" in text
    assert "CUDA 13.0" in text
    assert "Pictures: 1,234, median 500 x 500 pixels, 104 kB" in text


def test_write_names_files_after_date_benchmark_variant_and_device(tmp_path):
    paths = write(_record(variant="photos-224"), tmp_path / "new")
    assert [path.name for path in paths] == [
        f"2031-02-03-loader-photos-224-cpu.{kind}" for kind in ("json", "md", "png")
    ]
    assert paths[1].read_text() == markdown(_record())
    assert paths[2].read_bytes().startswith(b"\x89PNG")


def test_write_takes_a_path_and_draws_only_measurements(tmp_path):
    record = _record(rows=[{"source": "files", "loader": "ours", "images/s": "needs a GPU"}])
    assert write(record, tmp_path / "x.json") == [tmp_path / "x.json", tmp_path / "x.md"]


def test_what_is_written_is_read_back(tmp_path):
    path, *_ = write(_record(), tmp_path)
    assert load(path) == _record()


def test_json_is_strict(tmp_path):
    with pytest.raises(ValueError, match="JSON"):
        write(_record(config={"x": float("nan")}), tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not JSON"),
        ('{"benchmark": "x"}', "is no record"),
        ('{"benchmark": "x", "labels": [], "y": 1}', "is no record"),
    ],
)
def test_load_names_a_file_that_is_wrong(tmp_path, content, message):
    (tmp_path / "x.json").write_text(content)
    with pytest.raises(ValueError, match=rf"x\.json {message}"):
        load(tmp_path / "x.json")


def test_load_leaves_other_files_alone(tmp_path):
    (tmp_path / "x.json").write_text(json.dumps({"what": "an earlier form"}))
    assert load(tmp_path / "x.json") is None


def test_output_is_checked_before_the_work(tmp_path):
    (tmp_path / "file").write_text("")
    check_output(tmp_path / "new" / "folder")
    check_output(tmp_path / "new.json")
    with pytest.raises(ValueError, match="--output"):
        check_output(tmp_path / "file" / "folder")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["/usr/bin/dalikd", "bench", "loader", "--x", "a b"], "dalikd bench loader --x 'a b'"),
        (["/r/tools/bench/loader.py", "--x"], "python -m dalikd.tools.bench.loader --x"),
        (["/r/tools/bench/__main__.py", "all"], "python -m dalikd.tools.bench all"),
    ],
)
def test_the_command_is_what_a_user_types(monkeypatch, words, expected):
    monkeypatch.setattr(sys, "argv", words)
    found = Record("x", "y", ENVIRONMENT, "cpu", {}, "", "")
    assert found.command == expected
    assert found.stem == "2031-02-03-x-cpu"
    assert Path(found.stem).suffix == ""
