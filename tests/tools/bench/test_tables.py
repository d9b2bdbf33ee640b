import re
from pathlib import Path

import pytest

from dalikd.tools.bench import tables
from dalikd.tools.bench.record import Record, summary, write

ROOT = Path(__file__).parents[3]
README = "# x\n\nbefore\n\n<!-- benchmarks -->\nold\n<!-- /benchmarks -->\n\nafter\n"


def _write(folder, date, rate, **changes):
    environment = {
        "date": date,
        "time": f"{date}T00:00:00Z",
        "device": "CPU, 2 cores",
        "cpu": "Some CPU",
        "cores_available": 2,
        "memory_gib": 8,
        "load_average": [0, 0, 0],
        "commit": "abc",
        **dict.fromkeys(("python", "torch", "torchvision", "nvidia-dali-cuda120"), "1"),
    }
    fields = {"benchmark": "loader", "device": "cpu", "variant": "photos", **changes}
    record = Record(
        **fields,
        title=f"The {fields['benchmark']} of {fields['variant']}",
        environment=environment,
        config={},
        warm_up="",
        page_cache="",
        rows=[{"loader": "dalikd", "images/s": summary([rate])}, {"loader": "other", "images/s": summary([rate / 3])}],
        labels=("loader",),
        plotted="images/s",
    )
    write(record, folder)


@pytest.fixture
def place(tmp_path):
    folder = tmp_path / "docs" / "benchmarks"
    _write(folder, "2031-01-01", 100.0)
    _write(folder, "2031-02-01", 200.0)
    _write(folder, "2030-01-01", 300.0, variant="small")
    _write(folder, "2030-01-01", 400.0, device="gpu")
    (folder / "2029-01-01-loader.json").write_text('{"what": "an earlier form"}')
    (tmp_path / "README.md").write_text(README)
    return tmp_path


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
    line = "| [The loader of photos](docs/benchmarks/2031-02-01-loader-photos-cpu.md) | dalikd: 200; "
    assert line in text
    assert "| Some CPU, 2 cores, 2031-02-01 |" in text
    assert (place / "docs/benchmarks/2031-02-01-loader-photos-cpu.md").exists()


def test_writing_twice_changes_nothing(place):
    assert _run(place) == _run(place)


def test_check_fails_until_it_is_written(place):
    with pytest.raises(ValueError, match=r"not up to date: run python -m dalikd\.tools\.bench\.tables"):
        _run(place, check=True)
    assert (place / "README.md").read_text() == README
    text = _run(place)
    assert _run(place, check=True) == text
    _write(place / "docs" / "benchmarks", "2031-03-01", 500.0)
    with pytest.raises(ValueError, match="not up to date"):
        _run(place, check=True)


def test_marks_are_needed(place):
    (place / "README.md").write_text("nothing")
    with pytest.raises(ValueError, match="lacks the marks"):
        _run(place)


def test_without_records_the_place_is_empty(place, tmp_path):
    (tmp_path / "none").mkdir()
    tables.run(place / "README.md", tmp_path / "none")
    assert "<!-- benchmarks -->\n<!-- /benchmarks -->" in (place / "README.md").read_text()


def test_the_command_line(place, capsys):
    words = ["--readme", str(place / "README.md"), "--benchmarks", str(place / "docs/benchmarks"), "--check", "true"]
    with pytest.raises(SystemExit) as stop:
        tables.main(words)
    assert stop.value.code == 2
    assert capsys.readouterr().err.startswith("dalikd bench tables: error: ")


def test_the_readme_is_up_to_date():
    if "<!-- benchmarks -->" in (ROOT / "README.md").read_text("utf-8"):
        tables.run(check=True)
