import json
import threading
from pathlib import Path

import pytest
import yaml

from dalikd.trainers.study.plan import Cell
from dalikd.trainers.study.state import check_config, clear_unsaved, first_difference, is_done, keep_config, read_result

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
    with pytest.raises(ValueError, match=r"a/results.json is not a result \(.*best.epoch is missing\): delete it"):
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
    with pytest.raises(ValueError, match=r"holds a study with study.seeds: \[0, 1\], now it is \[0\]: give the same"):
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
