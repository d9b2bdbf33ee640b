"""Trackers beside TensorBoard: wandb, trackio and mlflow, by Accelerate's classes. A resumed run goes on in its curves.

A thread of its own sends the figures, so that a run neither waits for a network nor ends by it.
"""

import json
import netrc
import os
import queue
import threading
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlparse
from uuid import uuid4

from dalikd.pipelines.files import read_json, write_atomically
from dalikd.trainers.signals import say

__all__ = ["KEPT", "TrackerName", "Trackers", "check_trackers"]

TrackerName = Literal["tensorboard", "wandb", "trackio", "mlflow"]

KEPT = "trackers.json"  # in a run folder: what each tracker knows the run by, and the last place that it was sent
_PROJECT = "dalikd"
_PATIENCE = 30.0  # seconds at the end of a run for what is still to be sent


def check_trackers(names: Sequence[str]) -> None:
    """Look before the work whether trackers can be used.

    Raises:
        ValueError: one is not installed, or wandb has nobody to log in as.
    """
    for name in names:
        spec = None if name == "tensorboard" else find_spec(name)
        if name != "tensorboard" and (spec is None or spec.origin is None):  # a folder of that name is no package
            raise ValueError(f"--trackers {name}: it is not installed: pip install 'dalikd[{name}]'")
    if "wandb" in names and not _knows_wandb():
        raise ValueError(
            "--trackers wandb: nobody is logged in: call `wandb login` once, set WANDB_API_KEY, or set "
            "WANDB_MODE=offline and send the run later with `wandb sync`"
        )


def _knows_wandb() -> bool:
    """Whether wandb would ask nobody for a key: it is offline, or finds one where it looks for them."""
    import wandb  # pyright: ignore[reportMissingImports]

    settings = wandb.setup().settings  # of its own files too
    modes = os.environ.get("WANDB_MODE", ""), settings.mode
    if {"offline", "disabled", "dryrun"} & {*modes} or os.environ.get("WANDB_API_KEY") or settings.api_key:
        return True
    if getattr(settings, "identity_token_file", None):
        return True
    places = [os.environ.get("NETRC", ""), "~/.netrc", "~/_netrc"]
    for place in (Path(place).expanduser() for place in places if place):
        try:
            if netrc.netrc(str(place)).authenticators(urlparse(settings.base_url).hostname or ""):
                return True
        except (OSError, netrc.NetrcParseError):
            continue
    return False


class Trackers:
    """The trackers of one run, on the process that writes. One that fails is named once and left out from then on.

    Args:
        names: of the trackers, without tensorboard.
        folder: of the run.
        config: its options.
        done: of a resumed run the step and kind of the last entry that it has logged, as `log` takes them; None: it is
            a new one.
    """

    def __init__(
        self, names: Sequence[str], folder: Path, config: Mapping[str, Any], done: tuple[int, bool] | None
    ) -> None:
        self._folder, self._config = folder, dict(config)
        self._known: dict[str, Any] = {}
        self._given_up = False
        if done is not None and (folder / KEPT).is_file():
            try:
                for name, kept in read_json(folder / KEPT).items():
                    step, evaluation = kept["sent"]
                    self._known[name] = {"id": str(kept["id"]), "sent": max((int(step), bool(evaluation)), done)}
            except (ValueError, OSError, KeyError, TypeError, AttributeError) as error:
                self._known = {}
                words = f"{type(error).__name__}, {error}"
                say(f"dalikd: {folder / KEPT} cannot be read ({words}): trackers begin new curves of this run")
        self._entries: queue.Queue[tuple[tuple[int, bool], dict[str, float]] | None] = queue.Queue()
        self._thread = threading.Thread(target=self._work, args=(list(names),), name="dalikd-trackers", daemon=True)
        self._thread.start()

    def log(self, step: int, evaluation: bool, values: Mapping[str, float]) -> None:
        """Hand figures over. Those of a step that is done again after a kill have been sent before and are left out.

        Args:
            step: of the run.
            evaluation: whether they are of the evaluation that ends it.
            values: by name.
        """
        self._entries.put(((step, evaluation), dict(values)))

    def close(self) -> None:
        """Wait for what is still to be sent, half a minute at most."""
        self._entries.put(None)
        self._thread.join(_PATIENCE)
        if self._thread.is_alive():
            self._given_up = True
            say(
                f"dalikd: --trackers: not all was sent within {_PATIENCE:.0f} s, and the rest is left out: "
                f"{self._folder}/log.jsonl has every figure"
            )

    def _work(self, names: Sequence[str]) -> None:
        running: dict[str, Any] = {}
        for name in names:
            known = self._known.get(name)
            try:
                running[name], ident = _begin(name, self._folder, self._config, known and known["id"])
                self._known[name] = {"id": ident, "sent": known["sent"] if known else (0, False)}
                write_atomically(self._folder / KEPT, json.dumps(self._known).encode())
            except Exception as error:  # of networks, services and their packages: none of them ends a run
                self._lose(name, error, running)
        while (entry := self._entries.get()) is not None:
            place, values = entry
            for name in [name for name in running if place > tuple(self._known[name]["sent"])]:
                try:
                    # mlflow's own class logs into whichever run was begun last
                    running[name].log(
                        values, step=place[0], **({"run_id": self._known[name]["id"]} if name == "mlflow" else {})
                    )
                except Exception as error:
                    self._lose(name, error, running)
        for name, tracker in list(running.items()):
            try:
                tracker.finish()
            except Exception as error:
                self._lose(name, error, running)

    def _lose(self, name: str, error: Exception, running: dict[str, Any]) -> None:
        running.pop(name, None)
        if self._given_up:  # that has been told
            return
        words = " ".join(str(error).split())[:300] or type(error).__name__
        say(
            f"dalikd: --trackers {name} has failed and is left out of this run, whose figures are in "
            f"{self._folder}/log.jsonl: {words}"
        )


def _begin(name: str, folder: Path, config: dict[str, Any], ident: str | None) -> tuple[Any, str]:
    """Begin a tracker's run, or go on with the one it knows by `ident`. Returns the tracker and what it knows it by."""
    from accelerate import tracking

    tracker: Any
    if name == "wandb":
        import wandb  # pyright: ignore[reportMissingImports]

        ident = ident or uuid4().hex[:8]
        project, place = os.environ.get("WANDB_PROJECT", _PROJECT), os.environ.get("WANDB_DIR", str(folder))
        tracker = tracking.WandBTracker(
            project, id=ident, resume="allow", name=folder.name, dir=place, config=config,
            reinit="create_new", settings=wandb.Settings(console="off"),
        )  # fmt: skip
        tracker.start()
    elif name == "trackio":
        ident = ident or f"{folder.name}-{uuid4().hex[:8]}"  # it knows runs by their names
        tracker = tracking.TrackioTracker(_PROJECT, name=ident, resume="allow", config=config)
        tracker.start()
    else:
        tracker = tracking.MLflowTracker(_PROJECT, run_id=ident, run_name=folder.name)
        tracker.start()
        if ident is None:  # options of a run are written once there
            tracker.store_init_configuration(_flat(config))
        ident = tracker.tracker.info.run_id
    return tracker, str(ident)


def _flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in config.items():
        nested = isinstance(value, Mapping) and bool(value)
        found |= _flat(value, f"{prefix}{name}.") if nested else {f"{prefix}{name}": value}
    return found
