"""Run folders read back, and runs that cannot be compared."""

import json

import pytest

from dalikd.trainers.runs import check_images, differences, find_runs, read_run


def _result(train: str, seed: int, **data: object) -> dict[str, object]:
    return {"seed": seed, "data": data, "fingerprint": {"train": train, "val": "v"}}


def test_shares_are_compared_by_seed_and_size_and_not_by_folder():
    check_images(
        {"a": _result("x", 0, limit=5), "b": _result("y", 1, limit=5), "c": _result("z", 0, limit=6), "d": None}
    )
    check_images({"a": _result("x", 0, name="svhn"), "b": _result("y", 0, name="stl10")})
    check_images(
        {"a": _result("x", 0, share=0.5), "b": _result("y", 1, share=0.5), "c": _result("z", 0), "d": _result("z", 1)}
    )
    check_images({"a": _result("x", 0, root="here"), "b": _result("x", 1, root="there")})
    with pytest.raises(ValueError, match="x: a; y: b: name the same data"):
        check_images({"a": _result("x", 0, limit=5, root="here"), "b": _result("y", 0, limit=5, root="there")})
    with pytest.raises(ValueError, match="x: a; y: b: name the same data"):
        check_images({"a": _result("x", 0, share=0.5), "b": _result("y", 0, share=0.5)})
    with pytest.raises(ValueError, match="x: a; y: b: name the same data"):
        check_images({"a": _result("x", 0, share=1.0), "b": _result("y", 0)})  # of an earlier version
    with pytest.raises(ValueError, match="x: a; y: b: name the same data"):
        check_images({"a": _result("x", 0), "b": _result("y", 1)})  # all images: the seed does not choose


def test_results_of_an_earlier_version_are_told_apart():
    with pytest.raises(ValueError, match=r"delete the results of other data \(one holds no file sizes, as those of "):
        check_images({"a": _result("x" * 20, 0), "b": _result("y" * 16, 0)})


def test_many_runs_are_named_by_a_few():
    results = {f"run{number}": _result("x", 0) for number in range(7)} | {"odd": _result("y", 0)}
    with pytest.raises(ValueError, match="x: run0, run1, run2, run3, run4 and 2 more; y: odd: "):
        check_images(results)


def test_evaluations_name_their_images_by_their_config():
    def evaluated(val: str, seed: int) -> dict[str, object]:
        return {"fingerprint": val, "config": {"seed": seed, "data": {"val_limit": 9}}}

    check_images({"a": evaluated("x", 0), "b": evaluated("y", 1)})
    with pytest.raises(ValueError, match="x: a; y: b"):
        check_images({"a": evaluated("x", 0), "b": evaluated("y", 0)})


# ------------------------------------------------------------------------------------------------------- reading


def test_runs_are_found_below_a_study_with_their_methods_and_what_lies_beside(make_run, write_measurement, tmp_path):
    (tmp_path / "config.yaml").write_text("study: {methods: {kd: {}, at: {}}}\n")
    (tmp_path / "results.json").write_text("{}")
    make_run("distill/pair/x1/flip/kd/seed0", "flip")
    make_run("distill/pair/x1/flip/at/seed0", "flip")
    make_run("students/net/x1/seed0")
    make_run("students/net/x1/seed1", results={"finished": False})
    make_run("students/net/x1", results={"students": {}}).joinpath("students.yaml").touch()  # that of --students
    measured = write_measurement({"flip": 0.1}).rename(tmp_path / "teachers.json")
    evaluated = {"loss": 1.0, "top1": 0.5, "top5": 1.0, "config": {}, "fingerprint": "v", "versions": {}}
    (tmp_path / "teachers").mkdir()
    (tmp_path / "teachers/net.json").write_text(json.dumps(evaluated))
    (tmp_path / "other.json").write_text("[")
    found = find_runs([tmp_path])
    assert [(run.folder.relative_to(tmp_path).as_posix(), run.method) for run in found.runs] == [
        ("distill/pair/x1/flip/at/seed0", "at"),
        ("distill/pair/x1/flip/kd/seed0", "kd"),
        ("students/net/x1/seed0", ""),
    ]
    assert list(found.measurements) == [measured]
    assert list(found.evaluations) == [tmp_path / "teachers/net.json"]
    assert ["seed1 is not finished" in words or "other.json" in words for words in found.left_out] == [True, True]
    once = find_runs([tmp_path / "students", tmp_path, tmp_path / "students/net/x1/seed0"])
    assert len(once.runs) == 3


@pytest.mark.parametrize(
    ("file", "content", "words"),
    [
        ("config.yaml", "- a", "config.yaml names no model"),
        ("results.json", "{", "results.json: not a JSON file"),
        ("results.json", "[]", "a/results.json or config.yaml is damaged"),
        ("results.json", '{"last": 1}', "results.json: versions is missing: the run is damaged"),
        ("log.jsonl", '{"step": 1}\n{"epoch": 1}\n', "log.jsonl line 2 has no step: the run is damaged"),
        ("log.jsonl", '{"step": 1}\n{"st', "log.jsonl line 2: not a JSON file"),
    ],
)
def test_a_damaged_run_is_named_with_its_file(make_run, file, content, words):
    folder = make_run("a")
    (folder / file).write_text(content)
    with pytest.raises(ValueError, match="a/") as error:
        read_run(folder)
    assert words in str(error.value)


def test_a_folder_of_something_else_is_no_run(make_run, tmp_path):
    with pytest.raises(ValueError, match="is no run folder"):
        read_run(tmp_path)
    with pytest.raises(FileNotFoundError, match="gone: no such folder"):
        read_run(tmp_path / "gone")
    folder = make_run("a")
    (folder / "log.jsonl").unlink()
    with pytest.raises(FileNotFoundError, match=r"log\.jsonl"):
        read_run(folder)


@pytest.mark.parametrize(
    ("one", "other", "differs"),
    [
        ({}, {"label_smoothing": 0.0}, []),  # what an earlier version did not have, and is off
        ({}, {"label_smoothing": 0.1}, ["label_smoothing"]),
        ({"ema": 0.0}, {"ema": 1.0}, ["ema"]),
        ({"output": "a", "device": "cpu"}, {"output": "b", "device": "cuda"}, []),
        ({"schedule": {"name": "cosine", "final": 0.1}}, {}, ["schedule.final"]),
    ],
)
def test_what_differs_is_what_makes_another_run(make_run, one, other, differs):
    runs = [read_run(make_run(name, config=config)) for name, config in (("a", one), ("b", other))]
    assert list(differences(runs)) == differs
