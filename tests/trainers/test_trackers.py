import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from accelerate import Accelerator

from dalikd.trainers import trackers
from dalikd.trainers.trackers import KEPT, check_trackers
from dalikd.trainers.tracking import RunFolder

CONFIG = {"epochs": 2, "data": {"name": "digits"}}


class Fake:
    """Stands for a tracker's service: keeps what it was sent by the run it knows, and fails where it is told to."""

    def __init__(self) -> None:
        self.sent: dict[str, list[tuple[int, dict[str, float]]]] = {}
        self.finished, self.fails = list[str](), ""
        self.waits = threading.Event()
        self.waits.set()

    def begin(self, name: str, _: Path, config: dict[str, Any], ident: str | None) -> tuple[Any, str]:
        if self.fails == "begin":
            raise ConnectionError("no network\nat all")
        assert config == CONFIG
        ident = ident or f"{name}-{len(self.sent)}"
        self.sent.setdefault(ident, [])
        service = self

        class Tracker:
            def log(self, values: dict[str, float], step: int, **others: str) -> None:
                service.waits.wait()
                if service.fails == f"{step}":
                    raise RuntimeError("gone away")
                assert others == ({"run_id": ident} if name == "mlflow" else {})
                service.sent[ident].append((step, values))

            def finish(self) -> None:
                service.finished.append(ident)

        return Tracker(), ident


@pytest.fixture
def service(monkeypatch: pytest.MonkeyPatch) -> Fake:
    fake = Fake()
    monkeypatch.setattr(trackers, "_begin", fake.begin)
    return fake


def _log(path: Path, steps: range, resumed: int | None, *names: str) -> None:
    """What a run of two-step epochs logs, from one state to the next."""
    folder = RunFolder(path, writes=True)
    folder.start(CONFIG, resumed, names)
    for step in steps:
        folder.log(step, {"epoch": step / 2, "train": {"loss": 1 / step}, "name": "text"})
        if step % 2 == 0:
            folder.log(step, {"epoch": step // 2, "val": {"top1": 0.5}})
    folder.close()


def test_a_resumed_run_goes_on_in_its_curve_and_sends_nothing_twice(service, tmp_path):
    _log(tmp_path / "run", range(1, 4), None, "wandb", "mlflow", "tensorboard")
    assert service.sent["wandb-0"] == [
        *((1, {"epoch": 0.5, "train/loss": 1.0}), (2, {"epoch": 1.0, "train/loss": 0.5})),
        *((2, {"val/top1": 0.5}), (3, {"epoch": 1.5, "train/loss": 1 / 3})),
    ]
    assert (tmp_path / "run/tensorboard").is_dir()
    _log(tmp_path / "run", range(2, 3), 1, "wandb", "mlflow")  # killed again, before it has come as far
    _log(tmp_path / "run", range(2, 7), 1, "wandb", "mlflow", "trackio")
    steps = {name: [step for step, _ in sent] for name, sent in service.sent.items()}
    every = [1, 2, 2, 3, 4, 4, 5, 6, 6]
    assert steps == {"wandb-0": every, "mlflow-1": every, "trackio-2": every[1:]}
    known = json.loads((tmp_path / "run" / KEPT).read_text())
    assert {name: kept["id"] for name, kept in known.items()} == {
        **{"wandb": "wandb-0", "mlflow": "mlflow-1", "trackio": "trackio-2"},
    }
    _log(tmp_path / "run", range(1, 2), None, "wandb")  # replaced by a new run
    assert [step for step, _ in service.sent["wandb-3"]] == [1]


@pytest.mark.parametrize(
    "content", ["", "[]", '{"wandb": {"id": "wandb-0"}}', '{"wandb": {"id": "wandb-0", "sent": 1}}']
)
def test_where_the_ids_cannot_be_read_new_curves_begin(service, tmp_path, capfd, content):
    """It ends no run."""
    _log(tmp_path / "run", range(1, 3), None, "wandb")
    (tmp_path / "run" / KEPT).write_text(content)
    _log(tmp_path / "run", range(3, 4), 2, "wandb")
    assert [step for step, _ in service.sent["wandb-1"]] == [3]
    assert f"dalikd: {tmp_path}/run/{KEPT} cannot be read (" in capfd.readouterr().err


def test_an_evaluation_that_a_stop_has_left_out_is_sent(service, tmp_path):
    folder = RunFolder(tmp_path / "run", writes=True)
    folder.start(CONFIG, None, ["wandb"])
    folder.log(2, {"train": {"loss": 1.0}})
    folder.close()
    folder = RunFolder(tmp_path / "run", writes=True)
    folder.start(CONFIG, 2, ["wandb"])
    folder.log(2, {"val": {"top1": 0.5}})
    folder.close()
    assert service.sent["wandb-0"] == [(2, {"train/loss": 1.0}), (2, {"val/top1": 0.5})]


@pytest.mark.parametrize(("where", "words"), [("begin", "no network at all"), ("2", "gone away")])
def test_a_tracker_that_fails_is_named_once_and_ends_nothing(service, tmp_path, capfd, where, words):
    service.fails = where
    _log(tmp_path / "run", range(1, 5), None, "wandb", "tensorboard")
    err = capfd.readouterr().err
    assert err.count("\n") == 1
    assert "--trackers wandb has failed and is left out of this run" in err
    assert err.endswith(f"{words}\n")
    assert len((tmp_path / "run/log.jsonl").read_text().splitlines()) == 6
    assert [step for step, _ in service.sent.get("wandb-0", ())] == ([1] if where == "2" else [])


def test_a_run_does_not_wait_for_a_tracker_for_ever(service, tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(trackers, "_PATIENCE", 0.01)
    service.waits.clear()
    _log(tmp_path / "run", range(1, 3), None, "trackio")
    service.waits.set()
    err = capfd.readouterr().err
    assert err.count("\n") == 1
    assert f"not all was sent within 0 s, and the rest is left out: {tmp_path}/run/log.jsonl" in err


def test_what_is_not_installed_is_named_before_the_work(monkeypatch):
    monkeypatch.setattr(trackers, "find_spec", lambda _: None)
    check_trackers(["tensorboard"])
    with pytest.raises(ValueError, match=r"^--trackers mlflow: it is not installed: pip install 'dalikd\[mlflow\]'$"):
        check_trackers(["tensorboard", "mlflow"])


# ------------------------------------------------------------------------------------------ the packages themselves


@pytest.fixture
def away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], None]:
    """Writes and logs in nowhere but in the test's own folder."""
    Accelerator(cpu=True)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_DIR", "WANDB_PROJECT", "NETRC"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    return monkeypatch.setenv


def test_wandb_offline_keeps_its_id(away, tmp_path, capfd):
    wandb = pytest.importorskip("wandb")
    with pytest.raises(ValueError, match="nobody is logged in: call `wandb login` once, set WANDB_API_KEY"):
        check_trackers(["wandb"])
    wandb.teardown()  # it reads its variables once
    away("WANDB_MODE", "offline")
    check_trackers(["wandb"])
    _log(tmp_path / "run", range(1, 4), None, "wandb")
    _log(tmp_path / "run", range(3, 5), 2, "wandb")
    ident = json.loads((tmp_path / "run" / KEPT).read_text())["wandb"]["id"]
    # offline-run-TIME-ID, and a number behind it where two begin in one second
    found = [path.name.split("-")[3] for path in (tmp_path / "run/wandb").glob("offline-run-*")]
    assert found == [ident] * 2
    assert "has failed" not in capfd.readouterr().err


def test_mlflow_has_each_step_once(away, tmp_path, capfd):
    mlflow = pytest.importorskip("mlflow")
    away("MLFLOW_TRACKING_URI", f"file:{tmp_path}/mlruns")
    away("MLFLOW_ALLOW_FILE_STORE", "true")
    _log(tmp_path / "run", range(1, 4), None, "mlflow")
    _log(tmp_path / "run", range(3, 5), 2, "mlflow")
    assert "has failed" not in capfd.readouterr().err
    run = json.loads((tmp_path / "run" / KEPT).read_text())["mlflow"]["id"]
    history = mlflow.MlflowClient().get_metric_history(run, "train/loss")
    assert [point.step for point in history] == [1, 2, 3, 4]
    assert mlflow.get_run(run).data.params["data.name"] == "digits"
