"""Studies whose processes are killed and pre-empted at random moments end as one that was left alone: nothing is lost,
and nothing is done twice. With --full 200 runs of each kind; else eight, and two in a job."""

import json
import math
import os
import random
import re
import shutil
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from dalikd.pipelines.lock import is_held
from dalikd.tools import study
from dalikd.trainers.study.engines import run_local
from dalikd.trainers.study.state import lock_path, read_record

pytestmark = pytest.mark.faults

# what a process of the study begins with; where asked for, a file system without locks, whose leases go stale soon
HOOK = """
import errno, fcntl, os
if os.environ.get("NO_LOCKS"):
    from dalikd.pipelines import lock
    lock.HEARTBEAT = 1.0
    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")
    fcntl.flock = refuse
"""
BEGUN = re.compile(r"\[\d+/\d+\] (\S+)")
WORKER = HOOK + "import sys\nfrom dalikd.tools.study import main\nmain(sys.argv[1:])\n"


@pytest.fixture(scope="module")
def config(small_images: Path, tmp_path_factory: pytest.TempPathFactory, full: bool) -> Path:
    """Eight runs, of which two and two share a teacher pass; or 200, each by itself."""
    kd = "dalikd.kd.losses.KD"
    weights = (0.9, 0.5, 0.3, 0.2, 0.1) if full else (0.9, 0.5)
    losses = {f"kd{weight}": {"class_path": kd, "init_args": {"kd_weight": weight}} for weight in weights}
    content = {
        "data": {
            **{"name": "imagefolder", "root": str(small_images), "train_split": ".", "val_split": "."},
            **{"image_size": 32, "threads": 1, "limit": 48, "val_limit": 9},
        },
        **{"device": "cpu", "batch_size": 16, "mix": {"group": 8}, "epochs": 3, "checkpoint_every": 2},
        "train": {},
        "measure": {"window": 24, "epochs": 1},
        "study": {
            "pairs": [{"teacher": "resnet14", "student": "resnet8"}],
            "augmentation": ["mixup"],
            "methods": {name: {"loss": loss} for name, loss in losses.items()},
            "reference": next(iter(losses)),
            "seeds": list(range(33 if full else 2)),
            "share_teacher": not full,
        },
    }
    path = tmp_path_factory.mktemp("config") / "study.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


@pytest.fixture(scope="module")
def expected(start_forked: Any, config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a study that nobody has disturbed."""
    folder = tmp_path_factory.mktemp("peace")
    serial = start_forked(folder / "streams", "study", "--config", config, "--output", folder / "study")
    assert serial.wait(seconds=7200) == 0, (serial.out, serial.err)
    return folder / "study"


def _tables(folder: Path) -> dict[str, Any]:
    results = json.loads((folder / "results.json").read_text())
    del results["runs_on"]
    assert results["complete"]
    return {
        "results": results,
        **{name: (folder / name).read_bytes() for name in ("table.csv", "table.md", "gains.csv")},
    }


class _Trouble(threading.Thread):
    """Kills the processes of a fifth of the targets, and sends a signal to those of a tenth, each once, a moment after
    the run was begun or after its first log line. And looks at each run that is done.

    Args:
        folder: of the study.
        runs: their names.
        seed: of the moments, and of which are struck.
        targets: names of the runs to strike, of each process no more than one. Where one has ended before, another one
            is struck in its place.
        kills: whether any is killed.

    Attributes:
        sent: how often each signal has met a process that worked on one of them.
        lost: of each process that was struck, by signal: seconds that it had worked on runs since these were begun or
            saved for the last time.
    """

    def __init__(self, folder: Path, runs: list[str], seed: int, targets: list[str], *, kills: bool = True) -> None:
        super().__init__(daemon=True)
        self.folder, self.runs, self.sent = folder, runs, Counter[int]()
        self._chance, self._over = random.Random(seed), threading.Event()
        self.lost: dict[int, list[float]] = {}
        self._logged, self._made = dict[str, int](), dict[str, int]()
        self._begun = dict[tuple[str, str], float]()  # when a run was first seen in the hands of a process
        self._struck = dict[int, int]()  # signals of processes that have not ended yet
        killed, stopped = kills * max(1, len(targets) // 5), max(1, len(targets) // 10)
        chosen = self._chance.sample(targets, killed + stopped)
        self._spare = [name for name in targets if name not in chosen]
        self._planned = dict.fromkeys(chosen[:killed], signal.SIGKILL)
        self._planned |= {name: self._chance.choice((signal.SIGTERM, signal.SIGUSR2)) for name in chosen[killed:]}
        self._logs = {name for name in targets if not name.endswith(".json") and self._chance.random() < 0.5}
        self._due = dict[str, float]()

    def run(self) -> None:
        while not self._over.wait(0.01 if len(self.runs) < 9 else 0.1):
            for pid in [pid for pid in self._struck if _has_ended(pid)]:
                self.lost.setdefault(self._struck.pop(pid), []).append(self._lost(pid))
            for name in [name for name in self.runs if name not in self._made]:
                record = read_record(self.folder, name)
                if record.state == "done":
                    self._made[name] = self._file(name).stat().st_ino
                    self._pass_on(name)
                elif record.state == "running":
                    self._begun.setdefault((name, record.who), time.time())
                    if name in self._planned and is_held(lock_path(self.folder, name)):
                        if name not in self._logs or b"\n" in _content(self.folder / name / "log.jsonl"):
                            self._due.setdefault(name, time.time() + self._chance.uniform(0, 0.4))
                        if time.time() >= self._due.get(name, math.inf):
                            self._strike(name)

    def _pass_on(self, name: str) -> None:
        """One that was to be struck is done: the next one that has not begun takes its place."""
        begun = {name for name, _ in self._begun}
        spare = [other for other in self._spare if other not in begun]
        if name in self._planned and spare:
            self._planned[spare[0]] = self._planned.pop(name)
            self._spare.remove(spare[0])

    def _lost(self, pid: int) -> float:
        """Since a run that is not done was begun, or a state of it was saved, by a process that has just ended."""
        since = [time.time()]
        for (name, who), begun in self._begun.items():
            if who.startswith(f"process {pid} on") and read_record(self.folder, name).state != "done":
                states = (self.folder / name).glob("last/trainer*.pt") if not name.endswith(".json") else ()
                since.append(max([begun, *(state.stat().st_mtime for state in states)]))
        return time.time() - min(since)

    def _file(self, name: str) -> Path:
        return self.folder / name if name.endswith(".json") else self.folder / name / "results.json"

    def _strike(self, name: str) -> None:
        record, log = read_record(self.folder, name), self.folder / name / "log.jsonl"
        found = re.match(r"process (\d+) on", record.who)
        if record.state != "running" or found is None:
            return
        lines = log.read_text().splitlines() if log.exists() else []
        with suppress(ProcessLookupError):
            os.kill(int(found[1]), self._planned[name])
            number = self._planned.pop(name)
            self.sent[number] += 1
            self._struck[int(found[1])] = number
            if number != signal.SIGKILL and lines[:-1]:  # the last one may be half written
                self._logged[name] = json.loads(lines[-2])["step"]

    def check(self, expected: Path, begun: list[str], together: int) -> None:
        """Tables are as expected; a run was begun again only where its process, which has so many together, was ended;
        none was made again after it was done; what a pre-empted one had logged was kept, and no minute of work was lost
        with it."""
        self._over.set()
        self.join()
        assert _tables(self.folder) == _tables(expected)
        assert not self._planned
        assert set(self.runs) <= set(begun)
        assert len(begun) <= len(self.runs) + together * sum(self.sent.values()), Counter(begun)
        assert {name: self._file(name).stat().st_ino for name in self._made} == self._made
        for number, seconds in self.lost.items():
            print(f"{signal.Signals(number).name}: {len(seconds)} times, at most {max(seconds):.1f} s of work lost")
            assert number == signal.SIGKILL or max(seconds) < 60
        print(f"{len(self.runs)} runs, {len(begun) - len(self.runs)} of them begun again")
        for name, step in self._logged.items():
            events = sorted((self.folder / name / "tensorboard").iterdir())
            assert len(events) == 2 or step < 2, (name, step, events)  # gone on with, and not begun anew


def _content(path: Path) -> bytes:
    return path.read_bytes() if path.exists() else b""


def _has_ended(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


class _Process:
    """A forked worker as engines see it."""

    def __init__(self, forked: Any) -> None:
        self.forked, self.pid = forked, forked.pid

    def poll(self) -> int | None:
        return self.forked._process.exitcode

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)


def _names(study: Path) -> list[str]:
    """Of all runs of a study."""
    states = study / ".locks"
    return sorted(path.relative_to(states).as_posix().removesuffix(".state") for path in states.rglob("*.state"))


@pytest.mark.parametrize("locks", [False, True], ids=["without locks", "with locks"])
def test_workers_of_this_machine(start_forked, config, expected, tmp_path, monkeypatch, capsys, full, locks):
    if locks and not full:
        pytest.skip("asked for by --full")
    script, folder, started = tmp_path / "worker.py", tmp_path / "study", list[Any]()
    script.write_text(WORKER)

    def start(words: list[str], environment: dict[str, str], _log: Path) -> _Process:
        assert environment["OMP_NUM_THREADS"] == "1"
        streams = tmp_path / f"streams{len(started)}"
        started.append(start_forked(streams, script, *words, NO_LOCKS="" if locks else "1"))
        return _Process(started[-1])

    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(study, "run_local", partial(run_local, start=start))
    runs = _names(expected)
    trouble = _Trouble(folder, runs, 3, runs)
    trouble.start()
    study.main(["--config", str(config), "--output", str(folder), "--engine", "local", "--workers", "2"])
    out = capsys.readouterr().out
    trouble.check(expected, BEGUN.findall("".join(worker.out for worker in started)), together=1 if full else 2)
    assert f"{len(runs)} of {len(runs)} runs are done" in out
    assert len(started) == 2 + out.count("started again")
    assert not [path for path in (folder / ".locks").rglob("*lease*") if locks]


@pytest.fixture
def own_python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Lets each new Python begin with the hook."""
    (tmp_path / "python").mkdir()
    (tmp_path / "python" / "sitecustomize.py").write_text(HOOK)
    paths = [str(tmp_path / "python"), *filter(None, [os.environ.get("PYTHONPATH")])]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(paths))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    yield lambda locks: monkeypatch.setenv("NO_LOCKS", "" if locks else "1")
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):  # it has ended
            if "submitit" in " ".join(process.cmdline()):
                process.kill()


@pytest.mark.parametrize(
    ("locks", "share"),
    [(True, True), (True, False), (False, False)],
    ids=["with locks, students of a pass in one job", "with locks", "without locks"],
)
def test_jobs_of_submitit(config, expected, tmp_path, monkeypatch, capsys, full, locks, share, own_python):
    """In the short form all but students of one seed are done before, and their job is pre-empted alone."""
    pytest.importorskip("submitit")
    if not share and not full:
        pytest.skip("asked for by --full")
    own_python(locks)
    folder, runs = tmp_path / "study", _names(expected)
    if not full:
        shutil.copytree(expected, folder)
        runs = [name for name in runs if name.startswith("distill/") and name.endswith("seed1")]
        for name in runs:
            shutil.rmtree(folder / name)
            (folder / ".locks" / f"{name}.state").unlink()
    monkeypatch.chdir(tmp_path)
    content = yaml.safe_load(config.read_text())
    content["study"]["engine"] = {"cluster": "local", "parallel": 4 if full else 1, "timeout_min": 60}
    content["study"]["share_teacher"] = share
    (tmp_path / "slurm.yaml").write_text(yaml.safe_dump(content))
    methods = list(content["study"]["methods"])
    shared = [name for name in runs if share and name.split("/")[-2] in methods[1:]]  # each with one of the first
    targets = [name for name in runs if name not in shared]
    trouble = _Trouble(folder, runs, 5, targets, kills=full)
    trouble.start()
    words = ["--config", "slurm.yaml", "--output", str(folder), "--engine", "slurm", "--poll_seconds", "0.2"]
    study.main(words)
    assert "runs are done" in capsys.readouterr().out
    begun = BEGUN.findall("".join(log.read_text() for log in (folder / ".engine").glob("*.out")))
    trouble.check(expected, begun, together=len(methods) if share else 1)
