"""Signals and their words; which process of several is lost. Whole commands: tests/faults/test_processes.py."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from types import SimpleNamespace
from typing import Any

import pytest

from dalikd.trainers import stopping
from dalikd.trainers.signals import SIGNALS, Stopped, obeying, signal_name, stop_words
from dalikd.trainers.stopping import Interrupted, StopSignals, Watch


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Any:
    """The second of two processes, whose first is a child of this one, here or on another machine."""
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    heard = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    heard.bind(("127.0.0.1", 0))
    place = stopping._place() if request.param == "here" else "elsewhere"
    begun = stopping._process_state(child.pid)[1]
    first = child.pid, "machine", place, begun, heard.getsockname()[1], "word"
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setattr(stopping, "gather_object", lambda own: [first, *own])
    for name, seconds in {"_LOOK": 0.1, "_BEAT": 0.2, "_SILENT": 1.0, "_GRACE": 100.0}.items():
        monkeypatch.setattr(stopping, name, seconds)
    accelerator: Any = SimpleNamespace(process_index=1, num_processes=2)
    made = Watch(accelerator, launched=False)
    yield SimpleNamespace(watch=made, child=child, socket=heard, name=f"process 0 of 2 (machine, {child.pid})")
    made._over.set()
    child.kill()
    child.wait()
    heard.close()


def _say(of: Any, left: str) -> None:
    """What the first process tells, once the second one has told where it hears."""
    of.socket.settimeout(10)
    address = of.socket.recvfrom(4096)[1]
    of.socket.sendto(json.dumps(["word", 0, left]).encode(), address)


@pytest.mark.parametrize("watch", ["here"], indirect=True)
def test_a_process_that_works_or_has_ended_well_is_not_gone(watch):
    assert watch.watch.gone(0.5) == ""
    assert not watch.watch.speaks
    _say(watch, "well")
    time.sleep(0.3)
    watch.child.kill()
    assert watch.watch.gone(0.5) == ""
    assert watch.watch.speaks


@pytest.mark.parametrize("watch", ["here"], indirect=True)
@pytest.mark.parametrize(
    ("number", "words"), [(signal.SIGKILL, "was killed"), (signal.SIGSTOP, "does not answer: it is stopped (SIGSTOP)")]
)
def test_a_process_that_is_killed_or_stopped_is_named(watch, number, words):
    watch.child.send_signal(number)
    assert watch.watch.gone(30) == f"{watch.name} {words}"


@pytest.mark.parametrize("watch", ["here", "elsewhere"], indirect=True)
def test_a_process_that_fails_says_so_and_foreign_words_are_not_heard(watch):
    watch.socket.settimeout(10)
    address = watch.socket.recvfrom(4096)[1]
    for word in (b"\xff", b"{}", json.dumps(["another run", 0, "has failed"]).encode()):
        watch.socket.sendto(word, address)
    assert watch.watch.gone(0.5) == ""
    watch.socket.sendto(json.dumps(["word", 0, "has failed"]).encode(), address)
    assert watch.watch.gone(30) == f"{watch.name} has failed"


@pytest.mark.parametrize("watch", ["elsewhere"], indirect=True)
def test_one_on_another_machine_is_judged_once_it_has_been_heard(watch):
    """Where no datagram gets through, nothing is known of it."""
    assert watch.watch.gone(1.5) == ""
    _say(watch, "")
    assert watch.watch.gone(30) == f"{watch.name} does not answer: its machine or the network is gone"


def test_alone_and_without_a_launcher_there_is_nothing_to_watch(accelerator, monkeypatch):
    for name in ("TORCHELASTIC_RUN_ID", "LOCAL_WORLD_SIZE", stopping.STARTED_BY):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Watch, "one", None)
    Watch.begin(accelerator)
    assert Watch.one is None


@pytest.mark.parametrize("number", SIGNALS)
def test_every_signal_unwinds_or_is_noted(accelerator, number):
    before = {one: signal.getsignal(one) for one in SIGNALS}
    with pytest.raises(Stopped) as stopped, obeying("unwind"):
        signal.raise_signal(number)
    assert stopped.value.signal == number
    with StopSignals(accelerator) as stops:
        signal.raise_signal(number)
        with pytest.raises(Interrupted, match=f"stopped by signal {number}") as noted:
            stops.together(lambda: None)
    assert noted.value.signal == number
    assert {one: signal.getsignal(one) for one in SIGNALS} == before


def test_what_comes_one_by_one_stops_between_two(accelerator):
    given = []

    def take(stops: StopSignals) -> None:
        for number in stops.each(range(5)):
            given.append(number)
            if number == 2:
                os.kill(os.getpid(), signal.SIGUSR2)

    with StopSignals(accelerator) as stops, pytest.raises(Interrupted):
        take(stops)
    assert given == [0, 1, 2]
    assert list(StopSignals(accelerator).each("ab")) == ["a", "b"]  # outside of a run


def test_a_signal_that_was_to_be_ignored_stays_so():
    """As after nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with obeying("unwind"):
            signal.raise_signal(signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_signal_while_an_object_is_deleted_is_not_lost(monkeypatch):
    from dalikd.trainers.signals import _ask_again

    class Deleted:
        def __del__(self) -> None:
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(sys, "unraisablehook", _ask_again)

    def work() -> None:
        Deleted()
        time.sleep(5)

    with pytest.raises(Stopped), obeying("unwind"):
        work()


def test_signals_have_words():
    assert stop_words(signal.SIGINT) == "stopped (Ctrl-C)"
    assert stop_words(signal.SIGHUP) == "stopped by signal 1 (SIGHUP)"
    assert signal_name(40) == "40"
