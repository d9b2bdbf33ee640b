"""What ends a run before its end: signals and bad files, obeyed by all processes at one step; too little memory; and a
process that is gone, for which the others do not wait."""

import atexit
import json
import os
import re
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar
from uuid import uuid4

import torch
from accelerate import Accelerator
from torch import distributed
from torch.distributed import PrefixStore, TCPStore  # pyright: ignore[reportPrivateImportUsage]

from dalikd.pipelines.hardware import LACK, dali_words
from dalikd.pipelines.loader import BadFileError
from dalikd.trainers.signals import Asked, command_name, note_reason, obeying, say

__all__ = ["STARTED_BY", "Interrupted", "StopSignals", "Watch", "lack_of_memory", "save_after"]

Result = TypeVar("Result")

#: variable of a process that another one of dalikd has started and waits for
STARTED_BY = "DALIKD_STARTED_BY"

_BAD_FILE = 1 << 8  # above all signals
_ANY_WORK = timedelta(days=30)  # a collective waits as long as the work of another process takes: a Watch ends it
_BEAT = 5.0  # seconds from one sign of life to the next
_SILENT = 40.0  # seconds without one, after which a process does not answer
_GRACE = 6.0  # seconds for what a process does by itself once another one is gone
_SAVING = 30.0  # seconds to save in, as torchrun gives them too


class Interrupted(Exception):
    """A signal asked for an end; what there is, is saved.

    Args:
        message: how to go on.
        number: of the signal.
    """

    def __init__(self, message: str, number: int) -> None:
        super().__init__(message)
        self.signal = number


class StopSignals:
    """Inside of this context the first of `signals.SIGNALS` is only noted, until `together`; the next one, later than
    two seconds after it, ends the work at once.

    Args:
        accelerator: whose processes stop together, and enter and leave this context together.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self._several = accelerator.num_processes > 1
        self._group: Any = None  # of hosts, which run ahead of their devices
        self._asked, self._context = Asked(), ExitStack()

    def __enter__(self) -> "StopSignals":
        if self._several:
            self._group = distributed.new_group(backend="gloo", timeout=_ANY_WORK)
        self._asked = self._context.enter_context(obeying("note"))
        return self

    def __exit__(self, *_: object) -> None:
        self._context.close()
        self._asked = Asked()
        if self._group is not None:
            distributed.destroy_process_group(self._group)
            self._group = None

    def each(self, things: Iterable[Result]) -> Iterator[Result]:
        """What an iterable gives, got by `together`; it gives equally many on all processes, and no None."""
        iterator = iter(things)
        while (thing := self.together(lambda: next(iterator, None))) is not None:
            yield thing

    def together(self, work: Callable[[], Result]) -> Result:
        """The result of what each process does by itself, once it has gone well on all of them and none is to stop.

        All processes call this at the same steps, between two of what they do together. Their hosts meet, and wait for
        no device.

        Raises:
            BadFileError: a file cannot be decoded: the process's own, or else the first one that another one has met.
            Interrupted: one of them had a signal.
        """
        bad: BadFileError | None = None
        result: Any = None
        try:
            result = work()
        except BadFileError as error:
            bad = error
        number, why = self._asked.number, self._asked.why
        if self._group is not None:
            highest = torch.tensor(number if bad is None else _BAD_FILE, dtype=torch.int32)
            distributed.all_reduce(highest, distributed.ReduceOp.MAX, self._group)
            if not highest:
                return result
            found: list[Any] = [None] * distributed.get_world_size()
            distributed.all_gather_object(found, (number, why, bad), self._group)
            number, why = max((number, why) for number, why, _ in found)
            bad = bad or next(filter(None, (error for *_, error in found)), None)
        if bad is not None:
            raise bad
        if number:
            raise Interrupted(why or f"stopped by signal {number}", number)
        return result


@dataclass
class _Peer:
    """Another process of the run, as it was last heard of."""

    rank: int
    pid: int = 0
    host: str = ""
    place: str = ""  # processes of one place see each other in /proc
    begun: str = ""
    beats: int = 0
    left: str = ""  # how it has ended, by its own account; "well" where nobody needs it any more
    silent: float = 0.0  # seconds
    gone_at: int = -1  # rounds of reading before which it was not in /proc


class Watch:
    """Ends this process where it would wait for ever: another process of the run was killed or does not answer, or the
    launcher that would end them all is gone. Processes that work are left alone, however long they take.

    Of a process on the same machine /proc knows whether it is there, and whether it is stopped. One on another machine
    gives a sign of life every five seconds through the store that the processes have met at.

    Args:
        rank: of this process.
        processes: of the run.
        launched: whether a launcher has started it, whose end is this process's too.
    """

    one: "Watch | None" = None  # of this process

    def __init__(self, rank: int, processes: int, launched: bool) -> None:
        self._rank, self._parent = rank, os.getppid() if launched else 0
        self._begun, self._place = _process_state(os.getpid())[1], _place()
        self._peers = [_Peer(number) for number in range(processes) if number != rank]
        self._left, self._rounds, self._cause = "", 0, ""
        self._over, self._known = threading.Event(), threading.Event()
        self._store: Any = None
        if self._peers:
            address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
            # a connection of its own: on the other one the process may wait
            store = TCPStore(address, port, is_master=False, timeout=timedelta(seconds=_SILENT))
            prefix = f"dalikd/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
            self._store = PrefixStore(prefix, store)
            threading.Thread(target=self._beat, name="dalikd-beat", daemon=True).start()
        threading.Thread(target=self._look, name="dalikd-watch", daemon=True).start()

    @classmethod
    def begin(cls, accelerator: Accelerator) -> None:
        """Watch from now on, if there is anything to watch; all processes of the run begin."""
        launched = bool({"TORCHELASTIC_RUN_ID", "LOCAL_WORLD_SIZE", STARTED_BY} & os.environ.keys())
        several = accelerator.num_processes > 1
        if cls.one is None and (several or launched):
            cls.one = cls(accelerator.process_index, accelerator.num_processes, launched)
            atexit.register(lambda: cls.leave("has failed" if hasattr(sys, "last_value") else "well"))
            if several:
                set_timeout = getattr(distributed, "set_timeout", None)  # public from torch 2.14 on
                (set_timeout or distributed.distributed_c10d._set_pg_timeout)(_ANY_WORK)

    @classmethod
    def leave(cls, how: str = "well") -> None:
        """Tell the others that this process ends, and watch no more.

        Args:
            how: in words that follow its name; "well": nobody needs it any more.
        """
        watch, cls.one = cls.one, None
        if watch is None:
            return
        watch._left = how
        watch._over.set()
        if watch._store is not None:  # in a thread: the store may be gone
            last = threading.Thread(target=watch._last_word, daemon=True)
            last.start()
            last.join(10.0)

    def gone(self, seconds: float) -> str:
        """Which process is gone, in a line; empty if none is known to be within so many seconds."""
        self._known.wait(seconds)
        return self._cause

    @property
    def speaks(self) -> bool:
        """Whether it is for this process, of those on its machine, to tell what all of them know."""
        lower = [peer for peer in self._peers if peer.rank < self._rank and peer.place == self._place]
        return all(peer.left or _process_state(peer.pid)[0] in "XZtT" for peer in lower)

    # --------------------------------------------------------------------------------------------- the threads

    def _beat(self) -> None:
        ranks, beats = [str(peer.rank) for peer in self._peers], 0
        with suppress(RuntimeError):  # the store is gone: who had it falls silent
            while True:
                beats += 1
                self._write(beats)
                for peer, text in zip(self._peers, self._store.multi_get(ranks), strict=True):
                    heard = peer.beats
                    peer.pid, peer.host, peer.place, peer.begun, peer.beats, peer.left = json.loads(text)
                    if peer.beats != heard:
                        peer.silent = 0.0
                self._rounds += 1
                if self._over.wait(_BEAT):
                    return

    def _write(self, beats: int) -> None:
        word = [os.getpid(), socket.gethostname(), self._place, self._begun, beats, self._left]
        self._store.set(str(self._rank), json.dumps(word))

    def _last_word(self) -> None:
        """The first process may have the store, which the others still read."""
        with suppress(RuntimeError):
            self._write(-1)
            self._store.set(f"left {self._rank}", "")
            if self._rank == 0 and self._left == "well" and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
                self._store.wait([f"left {peer.rank}" for peer in self._peers], timedelta(seconds=8))

    def _look(self) -> None:
        last = time.monotonic()
        while not self._over.wait(1.0):
            now = time.monotonic()
            passed, last = min(now - last, 2.0), now  # what this process has slept, nobody was silent for
            if self._parent and os.getppid() != self._parent:
                self._follow_launcher()
            self._cause = next(filter(None, (self._lost(peer, passed) for peer in self._peers)), "")
            if self._cause:
                self._known.set()
                if not self._over.wait(_GRACE):
                    self._end(1, self._cause)

    def _lost(self, peer: _Peer, passed: float) -> str:
        """How another process is lost, in a line; empty if it is not."""
        if not peer.pid or peer.left == "well":
            return ""
        name = f"process {peer.rank} of {len(self._peers) + 1} ({peer.host}, {peer.pid})"
        if peer.left:
            return f"{name} {peer.left}"
        if peer.place != self._place:
            peer.silent += passed
            return f"{name} does not answer: its machine or the network is gone" if peer.silent > _SILENT else ""
        state, begun = _process_state(peer.pid)
        if state in "XZ" or begun != peer.begun:
            peer.gone_at = self._rounds if peer.gone_at < 0 else peer.gone_at
            peer.silent += passed  # its last word may be in the store
            heard = self._rounds > peer.gone_at + 1 or peer.silent > 3 * _BEAT
            return f"{name} was killed" if heard else ""
        peer.silent = peer.silent + passed if state in "tT" else 0.0
        return f"{name} does not answer: it is stopped (SIGSTOP)" if peer.silent > _SILENT else ""

    def _follow_launcher(self) -> None:
        """All processes of the machine see it at once; they save together, as after a signal to the launcher."""
        why, self._parent = f"stopped, as the process that started it ({self._parent}) is gone", 0
        note_reason(why)
        os.kill(os.getpid(), signal.SIGTERM)
        if not self._over.wait(_SAVING):
            self._end(128 + signal.SIGTERM, why)

    def _end(self, code: int, line: str) -> None:
        """The main thread may wait inside of a collective, where nothing else reaches it."""
        if self.speaks:
            say(f"{command_name()}: {line}")
        with suppress(Exception):
            sys.stdout.flush()
        os._exit(code)


def _place() -> str:
    """The same for all processes that see each other by their numbers."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text() + str(Path("/proc/self/ns/pid").readlink())
    except OSError:
        return uuid4().hex


def _process_state(pid: int) -> tuple[str, str]:
    """The letter of a process's state (X: there is none), and when it has begun."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return "X", ""
    return fields[0], fields[19]


def save_after(error: Exception, save: Callable[[], object], how_to_go_on: str) -> None:
    """Save after an error, whose text then says how to go on. A second error, such as a full disk, does not hide it."""
    try:
        save()
    except Exception as second:
        how_to_go_on = f"the state could not be saved ({type(second).__name__}: {second})"
    error.args = (f"{error}; {how_to_go_on}",)


def lack_of_memory(error: Exception) -> str | None:
    """One line that says what ran out of memory, and what helps; None for any other error."""
    if isinstance(error, MemoryError):
        words = str(error) or "the machine ran out of memory"
        return words if ": try " in words else f"{words}: try fewer --data.threads or a smaller --batch_size"
    if not isinstance(error, RuntimeError):
        return None
    text = str(error)
    if not LACK.search(text):
        return None
    if "in pipeline" in text:
        helps = "--data.prefetch 1, fewer --data.threads, --data.resident false or a smaller --batch_size"
        return f"DALI ran out of memory ({dali_words(error)}): try {helps}"
    # torch goes on with what its allocator holds
    words = " ".join(re.split(r"\n| Including non-PyTorch| Process \d| Of the allocated", text)[0].split())
    helps = "--accumulation 2 or more, a smaller --batch_size, --precision bf16, with measure --images_per_call"
    return f"{words.rstrip('.')}: try {helps}"
