import runpy
import sys

import pytest

from dalikd.tools import bench
from dalikd.tools.bench.dispatch import BENCHMARKS


@pytest.mark.parametrize("arguments", [[], ["-h"], ["--help"]])
def test_help_lists_the_benchmarks(capsys, arguments):
    with pytest.raises(SystemExit) as stop:
        bench.main(arguments)
    assert stop.value.code == 0
    out = capsys.readouterr().out
    assert out.startswith("usage: dalikd bench NAME")
    for name, text in BENCHMARKS.items():
        assert f"  {name} " in out
        assert text in out


def test_an_unknown_benchmark_is_one_line(capsys):
    with pytest.raises(SystemExit) as stop:
        bench.main(["laoder"])
    assert stop.value.code == 2
    assert capsys.readouterr().err == (
        f"dalikd bench: error: unknown benchmark laoder; there are {', '.join(BENCHMARKS)}\n"
    )


@pytest.mark.parametrize("name", ["loader", "all"])
def test_a_benchmark_explains_itself_in_both_ways(monkeypatch, capsys, name):
    with pytest.raises(SystemExit) as stop:
        bench.main([name, "--help"])
    assert stop.value.code == 0
    out = capsys.readouterr().out
    assert out.startswith(f"usage: dalikd bench {name}")
    monkeypatch.setattr(sys, "argv", ["x", "--help"])
    monkeypatch.delitem(sys.modules, f"dalikd.tools.bench.{name}")
    with pytest.raises(SystemExit):
        runpy.run_module(f"dalikd.tools.bench.{name}", run_name="__main__")
    assert capsys.readouterr().out == out
