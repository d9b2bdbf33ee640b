"""The house stays near: how far one training step and a chain of imports reach."""

import pytest

from dalikd.tools.distance import circles, climbs, longest_chain, main


@pytest.mark.slow
def test_a_step_and_a_chain_of_imports_stay_short(capsys):
    """At most 65 functions in 17 files, 12 files in a chain; no circle, and rooms import downwards alone."""
    assert main([]) == 0, capsys.readouterr().out


def test_circles_chains_and_climbs_are_found():
    graph = {"kd/a.py": {"kd/b.py"}, "kd/b.py": set(), "trainers/c.py": {"kd/a.py", "kd/b.py"}}
    assert longest_chain(graph) == ["trainers/c.py", "kd/a.py", "kd/b.py"]
    assert (circles(graph), climbs(graph)) == ([], [])
    graph["kd/b.py"] = {"trainers/c.py"}
    assert circles(graph) == [["kd/a.py", "kd/b.py", "trainers/c.py"]]
    assert climbs(graph) == ["kd/b.py imports trainers/c.py"]
