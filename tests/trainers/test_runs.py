"""Run folders read back, and runs that cannot be compared."""

import pytest

from dalikd.trainers.runs import check_images


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
