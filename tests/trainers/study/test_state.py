import json
import threading
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
import yaml

from dalikd.trainers.study import state
from dalikd.trainers.study.plan import Cell
from dalikd.trainers.study.state import (
    Record,
    check_config,
    clear_unsaved,
    first_difference,
    generations,
    is_done,
    keep_config,
    read_plans,
    read_record,
    read_result,
    write_record,
)

RUN = Cell("distill/a", "distill", {})
FILE = Cell("measure/a.json", "measure", {})


def _write(path: Path, content: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def test_a_run_is_done_when_it_says_so(tmp_path):
    assert not is_done(tmp_path, RUN)
    _write(tmp_path / RUN.result, {"finished": False})
    assert not is_done(tmp_path, RUN)
    epoch = {"epoch": 1, "val": {"loss": 1.0, "top1": 0.5, "top5": 1.0}}
    whole = {"finished": True, "epochs": 1.0, "last": epoch, "best": epoch, "versions": {}}
    whole["fingerprint"] = {"train": "t", "val": "v"}
    _write(tmp_path / RUN.result, whole)
    assert read_result(tmp_path, RUN) == whole
    del whole["best"]
    _write(tmp_path / RUN.result, whole)
    with pytest.raises(ValueError, match=r"a/results.json is not a result \(.*best.val.loss is missing\): delete it"):
        read_result(tmp_path, RUN)


def test_a_file_is_done_when_it_is_there(tmp_path):
    cell = Cell("teachers/a.json", "evaluate", {})
    assert not is_done(tmp_path, cell)
    _write(tmp_path / cell.result, {"loss": 1.0, "top1": 0.5, "top5": 1.0, "fingerprint": "v", "versions": {}})
    assert is_done(tmp_path, cell)


def test_a_broken_result_is_named(tmp_path):
    _write(tmp_path / FILE.result, {"results": []})
    with pytest.raises(ValueError, match=r"measure/a.json is not a result \(.*versions is missing\): delete it"):
        is_done(tmp_path, FILE)
    (tmp_path / FILE.result).write_text("{")
    with pytest.raises(ValueError, match=r"measure/a.json is not a result .*delete it"):
        is_done(tmp_path, FILE)


def test_a_run_without_a_state_is_removed_and_one_with_a_state_is_gone_on_with(tmp_path):
    assert clear_unsaved(tmp_path, RUN) is None
    (tmp_path / RUN.name / "last").mkdir(parents=True)
    (tmp_path / RUN.name / "last" / "trainer.pt").touch()
    assert clear_unsaved(tmp_path, RUN) == tmp_path / RUN.name
    (tmp_path / RUN.name / "last" / "trainer.pt").unlink()
    assert clear_unsaved(tmp_path, RUN) is None
    assert not (tmp_path / RUN.name).exists()
    _write(tmp_path / FILE.result, {})
    assert clear_unsaved(tmp_path, FILE) is None
    assert (tmp_path / FILE.result).exists()


def test_a_folder_keeps_its_study(tmp_path):
    config = {"epochs": 3, "data": {"root": "a", "threads": 1}, "study": {"seeds": [0, 1]}}
    folder = tmp_path / "study"
    check_config(folder, config)
    assert not folder.exists()
    keep_config(folder, config)
    assert yaml.safe_load((folder / "config.yaml").read_text()) == config
    keep_config(folder, {**config, "device": "cpu", "data": {"root": "elsewhere", "threads": 8}})
    assert yaml.safe_load((folder / "config.yaml").read_text()) == config
    with pytest.raises(ValueError, match=r"study.seeds: \[0, 1\], now it is \[0\]: give the same or more, or name"):
        keep_config(folder, {**config, "study": {"seeds": [0]}})
    with pytest.raises(
        ValueError, match=r"with batch_size: left out, now it is 32: .* name a new folder with --output"
    ):
        check_config(folder, {**config, "batch_size": 32})


def test_of_several_that_start_at_once_one_writes(tmp_path):
    folder, refused = tmp_path / "study", []

    def start(seed: int) -> None:
        try:
            keep_config(folder, {"study": {"seeds": [seed % 2]}})
        except ValueError as error:
            refused.append(str(error))

    threads = [threading.Thread(target=start, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(refused) == 4
    assert [path.name for path in folder.iterdir()] == ["config.yaml"]


# -------------------------------------------------------------------------------------------------------- growth

STUDY = {
    "pairs": [{"teacher": "a", "student": "b"}],
    "augmentation": ["flip"],
    "methods": {"kd": {"loss": "KD"}},
    "seeds": [0, 1],
    "epoch_factor": [1.0],
}


def _with(**changed: object) -> dict[str, Any]:
    return {"epochs": 3, "study": {**STUDY, **changed}}


def test_a_study_may_grow_and_says_when(tmp_path):
    folder = tmp_path / "study"
    keep_config(folder, _with())
    assert read_plans(folder) == []
    more = _with(seeds=[0, 2, 1], augmentation=["mixup", "flip"])
    assert check_config(folder, more) == {"seeds": [2], "augmentation": ["mixup"]}
    assert generations(folder, ["mixup", "flip"]) == [["flip"], ["mixup"]]
    keep_config(folder, more)
    assert yaml.safe_load((folder / "config.yaml").read_text()) == more
    assert [plan["study"]["seeds"] for plan in read_plans(folder)] == [[0, 1], [0, 2, 1]]
    at = {"kd": {"loss": "KD"}, "at": {"loss": "AT"}}
    most = _with(seeds=[0, 2, 1], augmentation=["mixup", "flip", "cutmix"], methods=at)
    keep_config(folder, most)
    assert len(read_plans(folder)) == 3
    assert generations(folder, ["mixup", "flip", "cutmix"]) == [["flip"], ["mixup"], ["cutmix"]]
    keep_config(folder, most)
    assert len(read_plans(folder)) == 3
    with pytest.raises(ValueError, match=r"with study.augmentation: \[\"mixup\", \"flip\", \"cutmix\"\], now it is"):
        check_config(folder, more)


def test_a_growth_that_was_cut_off_is_begun_anew(tmp_path, monkeypatch):
    folder = tmp_path / "study"
    keep_config(folder, _with())
    write = state.write_atomically

    def cut_off(path: Path, *rest: Any, **more: Any) -> None:
        if path.name == "config.yaml":
            raise OSError("killed")
        write(path, *rest, **more)

    with monkeypatch.context() as patch:
        patch.setattr(state, "write_atomically", cut_off)
        with pytest.raises(OSError, match="killed"):
            keep_config(folder, _with(augmentation=["flip", "mixup"]))
    keep_config(folder, _with())
    assert generations(folder, ["flip"]) == [["flip"]]
    assert generations(folder, ["flip", "cutmix"]) == [["flip"], ["cutmix"]]
    keep_config(folder, _with(augmentation=["flip", "cutmix"]))
    assert [plan["study"]["augmentation"] for plan in read_plans(folder)] == [["flip"], ["flip", "cutmix"]]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"seeds": [0]}, r"study.seeds: \[0, 1\], now it is \[0\]: give the same or more"),
        ({"seeds": [2, 0, 1]}, r"study.seeds: \[0, 1\], now it is \[2, 0, 1\]: give the same or more"),
        ({"methods": {"kd": {"loss": "AT"}}}, r'study.methods.kd.loss: "KD", now it is "AT"'),
        ({"methods": {}}, r'study.methods.kd.loss: "KD", now it is left out'),
        ({"pairs": [{"teacher": "c", "student": "b"}]}, r'study.pairs: \[.*"a".*\], now it is \[.*"c"'),
    ],
)
def test_what_is_there_may_not_change(tmp_path, changed, message):
    keep_config(tmp_path / "study", _with())
    with pytest.raises(ValueError, match=message):
        keep_config(tmp_path / "study", _with(**changed, augmentation=["flip", "mixup"]))
    assert yaml.safe_load((tmp_path / "study" / "config.yaml").read_text()) == _with()


def test_a_study_without_methods_gets_none(tmp_path):
    keep_config(tmp_path / "study", _with(methods={}))
    with pytest.raises(ValueError, match=r"study.methods: \{\}, now it is left out|study.methods.kd.loss: left out"):
        check_config(tmp_path / "study", _with())


def test_damaged_plans_are_named(tmp_path):
    keep_config(tmp_path, _with())
    (tmp_path / "plans.yaml").write_text("- 3\n")
    with pytest.raises(ValueError, match=r"plans.yaml is damaged: it does not list plans"):
        generations(tmp_path, ["flip"])


# ------------------------------------------------------------------------------------------------------- records


def test_a_record_is_read_back_and_one_that_is_none_is_empty(tmp_path):
    assert read_record(tmp_path, "measure/a.json") == Record()
    write_record(tmp_path, "measure/a.json", Record("failed", 1.5, 2, "the loss is nan", "process 7"))
    found = read_record(tmp_path, "measure/a.json")
    assert (found.state, found.seconds, found.crashes, found.error, found.who) == (
        *("failed", 1.5, 2, "the loss is nan", "process 7"),
    )
    assert datetime.fromisoformat(found.at).tzinfo is not None
    (tmp_path / ".locks/measure/a.json.state").write_text('{"of": "another version"}')
    assert read_record(tmp_path, "measure/a.json") == Record()


@pytest.mark.parametrize("content", ["", "epochs: 3\n", "- a\n"])
def test_another_folder_is_not_touched(tmp_path, content):
    (tmp_path / "config.yaml").write_text(content)
    with pytest.raises(ValueError, match="holds something else than a study: name another folder"):
        check_config(tmp_path, {"study": {}})


def test_a_folder_with_other_files_is_not_touched(tmp_path):
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(ValueError, match="holds other files and is not touched"):
        keep_config(tmp_path, {"study": {}})


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ({"a": 1}, {"a": 1}, None),
        ({"a": 1}, {"a": 2}, ("a", "1", "2")),
        ({"a": {"b": 1}}, {"a": {"b": None}}, ("a.b", "1", "null")),
        ({"a": {"b": 1}}, {"a": {}}, ("a.b", "1", "left out")),
        ({}, {"a": {"b": 1}}, ("a.b", "left out", "1")),
        ({"device": "cpu", "train": {"data": {"threads": 1}}}, {}, None),
        ({"data": {"root": "a"}}, {"data": {"root": "b"}}, None),
        ({"data": {"name": "a"}}, {"data": {"name": "b"}}, ("data.name", '"a"', '"b"')),
    ],
)
def test_the_first_difference_is_found(old, new, expected):
    assert first_difference(old, new) == expected
