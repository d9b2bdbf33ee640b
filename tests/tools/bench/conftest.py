"""Calls of benchmarks, with a record of as few rounds as a test can do with."""

from collections.abc import Callable
from pathlib import Path

import pytest

from dalikd.pipelines.data import open_source
from dalikd.pipelines.sources import Source
from dalikd.tools.bench import loader, main, published, record, teacher
from dalikd.tools.bench.record import Record, load


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes need no rest where nothing is concluded, and two rounds will do; two cores, whatever there are."""
    for module in (loader, published, teacher):
        monkeypatch.setattr(module, "settle", lambda: None)
    monkeypatch.setattr(record, "LEAST_ROUNDS", 2)
    for module in (loader, published):
        monkeypatch.setattr(module, "cores", lambda: 1)


@pytest.fixture
def source(small_images: Path) -> Source:
    """300 files of 32 pixels."""
    return open_source("imagefolder", small_images, "train", split=".")


@pytest.fixture
def bench(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[Record, str]]:
    """Calls `dalikd bench …`; returns its record, whose JSON is strict, and what it printed."""

    def call(*words: object) -> tuple[Record, str]:
        capsys.readouterr()
        main([*map(str, words), "--rounds", "2", "--output", str(tmp_path / "x.json")])
        found = load(tmp_path / "x.json")
        assert found is not None
        return found, capsys.readouterr().out

    return call


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Calls a benchmark that ends with one line, and returns it."""

    def call(*words: object) -> str:
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            main([str(word) for word in words])
        assert stop.value.code == 2
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert error.startswith(f"dalikd bench {words[0]}: error: ")
        return error

    return call
