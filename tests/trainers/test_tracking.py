import json
import resource
from pathlib import Path
from uuid import uuid4

import pytest
import torch
import yaml
from accelerate import Accelerator
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dalikd.pipelines.hardware import package_versions
from dalikd.trainers.tracking import LOCK, RunFolder, alone, check_writable, versions, write_json


def _start(path: Path, step: int | None = None) -> RunFolder:
    folder = RunFolder(path, writes=True)
    folder.start({"epochs": 2, "model": "resnet8"}, step)
    return folder


def _steps(path: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (path / "log.jsonl").read_text().splitlines()]


def test_a_folder_holds_config_log_and_events(tmp_path):
    folder = _start(tmp_path / "a" / "run")
    folder.log(1, {"lr": 0.1, "train": {"loss": 2.0}})
    folder.log(2, {"lr": 0.1, "name": "text is left out"})
    folder.close()
    path = folder.path
    assert yaml.safe_load((path / "config.yaml").read_text()) == {"epochs": 2, "model": "resnet8"}
    first = json.loads((path / "log.jsonl").read_text().splitlines()[0])
    assert first == {"step": 1, "lr": 0.1, "train": {"loss": 2.0}}
    events = EventAccumulator(str(path / "tensorboard")).Reload()
    assert events.Tags()["scalars"] == ["lr", "train/loss"]
    assert [event.step for event in events.Scalars("lr")] == [1, 2]


def test_resuming_drops_the_lines_after_the_saved_step(tmp_path):
    folder = _start(tmp_path / "run")
    for step in (1, 2, 2, 3, 4):
        folder.log(step, {"lr": float(step)})
    folder.close()
    with (tmp_path / "run" / "log.jsonl").open("a") as log:
        log.write('{"step": 5, "lr"\n[1]\n')  # a kill in the middle of a line
    with (tmp_path / "run" / "log.jsonl").open("ab") as log:
        log.write(b'{"step": 2, "lr": "\xff"}\n')  # a damaged one
    folder = _start(tmp_path / "run", 3)
    folder.log(4, {"lr": 40.0})
    folder.close()
    assert _steps(tmp_path / "run") == [1, 2, 2, 3, 4]
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload().Scalars("lr")
    assert [(event.step, event.value) for event in events] == [(1, 1), (2, 2), (2, 2), (3, 3), (4, 40)]


@pytest.mark.parametrize("full", ["log.jsonl", "tensorboard"])
def test_a_full_disk_is_an_error_of_the_entry_that_meets_it(tmp_path, full):
    """Of TensorBoard's too, at once: no thread of its own meets it later."""
    folder = _start(tmp_path / "run")
    grown = folder.path / "log.jsonl" if full == "log.jsonl" else next((folder.path / "tensorboard").iterdir())
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    other = folder.path / "log.jsonl" if full == "tensorboard" else next((folder.path / "tensorboard").iterdir())
    with grown.open("ab") as file:  # the fuller one of both
        file.write(bytes(100 + other.stat().st_size))
    resource.setrlimit(resource.RLIMIT_FSIZE, (grown.stat().st_size + 10, before[1]))
    try:
        with pytest.raises(OSError, match=rf"{grown.name} cannot be written: File too large"):
            folder.log(1, {"lr": 1.0})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        folder.close()


def test_a_run_whose_folder_is_removed_notices_it(tmp_path):
    accelerator = Accelerator(cpu=True)
    with alone([("run", tmp_path / "run" / LOCK)], accelerator) as (lock,):
        folder = _start(tmp_path / "run")
        folder.lock = lock
        folder.log(1, {"lr": 1.0})
        with pytest.raises(ValueError, match="--output run is being written by process"):  # noqa: SIM117
            with alone([("run", tmp_path / "run" / LOCK)], accelerator):
                pass
        folder.path.rename(tmp_path / "gone")
        for write in (lambda: folder.log(2, {"lr": 1.0}), lambda: folder.results({})):
            with pytest.raises(OSError, match="run was removed or replaced while this call wrote into it"):
                write()
        folder.close()
    assert not (tmp_path / "run").exists()


def test_a_run_is_not_overwritten_untold(tmp_path):
    folder = RunFolder(tmp_path / "run", writes=True)
    folder.check_new(overwrite=False)
    (tmp_path / "run").mkdir()
    folder.check_new(overwrite=False)
    folder.start({"epochs": 1}, None)
    folder.log(1, {"lr": 1.0})
    folder.results({"finished": True})
    folder.close()
    for name in ("last/trainer.pt", "best/student.safetensors"):
        (folder.path / name).parent.mkdir()
        (folder.path / name).write_text("old")
    with pytest.raises(
        ValueError, match=r"holds a run: go on with it by --resume .*run, name another folder, or replace"
    ):
        folder.check_new(overwrite=False)
    folder.check_new(overwrite=True)
    _start(folder.path).close()
    assert _steps(folder.path) == []
    left = {file.relative_to(folder.path).as_posix() for file in folder.path.rglob("*") if file.is_file()}
    assert {name for name in left if not name.startswith("tensorboard")} == {"config.yaml", "log.jsonl"}
    assert len([name for name in left if name.startswith("tensorboard")]) == 1


def test_a_run_that_is_being_begun_is_no_folder_of_other_files(tmp_path):
    """Another call has it, as the lock says, or was killed before it has written config.yaml."""
    (tmp_path / "last").mkdir()
    (tmp_path / "log.jsonl").touch()
    RunFolder(tmp_path, writes=True).check_new(overwrite=False)  # it was stopped
    (tmp_path / "last/thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match="holds other files"):
        RunFolder(tmp_path, writes=True).check_new(overwrite=False)
    for name in (LOCK, f".config.yaml.{uuid4().hex}"):  # the second as it is written beside its place
        (tmp_path / name).touch()
    RunFolder(tmp_path, writes=True).check_new(overwrite=False)


def test_other_peoples_files_are_never_touched(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    for overwrite in (False, True):
        with pytest.raises(ValueError, match="holds other files and is not touched: name another folder"):
            RunFolder(tmp_path, writes=True).check_new(overwrite)


def test_only_the_main_process_writes(tmp_path):
    folder = RunFolder(tmp_path / "run", writes=False)
    folder.start({}, None)
    folder.log(1, {"lr": 1.0})
    folder.results({})
    folder.close()
    assert not (tmp_path / "run").exists()


# ------------------------------------------------------------------------------------------------------- files


def test_what_cannot_be_written_is_found_before_the_work(tmp_path):
    check_writable("--json", tmp_path / "new" / "deep" / "results.json")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file" / "x.json", tmp_path):
        with pytest.raises(ValueError, match=f"--json: {path} cannot be written"):
            check_writable("--json", path)
    with pytest.raises(ValueError, match=r"--output: .* cannot be written"):
        RunFolder(tmp_path / "file", writes=True).check_new(overwrite=True)


def test_relative_paths_are_checked_too(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    check_writable("--json", Path("results.json"))


def test_json_is_strict_and_whole(tmp_path):
    path = tmp_path / "new" / "x.json"
    write_json(path, {"loss": 1.5})
    assert json.loads(path.read_text()) == {"loss": 1.5}
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(path, {"loss": float("nan")})
    assert json.loads(path.read_text()) == {"loss": 1.5}
    assert [file.name for file in path.parent.iterdir()] == ["x.json"]


def test_versions_say_what_made_the_result():
    found = versions(torch.device("cpu"))
    assert {"python", "torch", "torchvision", "timm", "accelerate", "numpy"} <= set(found)
    assert package_versions().items() <= found.items()
    assert found["torch"].startswith(torch.__version__.split("+")[0])
    assert found["device"].startswith("CPU")
    assert len(found["date"]) == 10
