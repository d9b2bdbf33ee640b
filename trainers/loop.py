"""The one training loop: forward, backward, step, count; evaluate; checkpoint; track."""

import math
import os
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import Any, NoReturn, cast

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD, Adam, AdamW
from tqdm import tqdm

from dalikd.kd.backbones.auxiliary import AuxiliaryNet
from dalikd.kd.teacher import batch_statistics
from dalikd.pipelines.doctor import printable
from dalikd.pipelines.draw_spec import Batch
from dalikd.pipelines.files import file_digest, write_atomically
from dalikd.pipelines.loader import BadFileError, Loader
from dalikd.trainers.average import MovingAverage
from dalikd.trainers.checkpoint import CheckpointWriter, Weights, read_newest, reading, weights_of
from dalikd.trainers.evaluate import evaluate, replaced_files
from dalikd.trainers.launch import check_compiler
from dalikd.trainers.options import ScheduleConfig
from dalikd.trainers.progress import progress as progress_bar
from dalikd.trainers.resume import check_same_run
from dalikd.trainers.stopping import Interrupted, StopSignals, lack_of_memory, save_after
from dalikd.trainers.tasks.base import Task, TrainingOptions
from dalikd.trainers.tracking import RunFolder, versions

__all__ = [
    "Loop",
    "Meter",
    "learning_rate_factor",
    "make_optimizer",
    "on_host",
    "parameter_groups",
    "run_together",
    "step_seed",
]

_TRAINED_AGAIN = 1000  # steps at most, from the last saved state on, to find the first one that is not finite
_LEAST_SCALE = 2.0**-14  # of losses in fp16: thirty steps that overflow, more than others have been, from the first one
_LOOKED_AT = 16  # images at most, of the last batch, before a state is saved


@dataclass
class _Progress:
    """Where a run stands."""

    step: int = 0  # optimizer steps done
    epochs: int = 0  # ended, with their evaluation
    last: dict[str, Any] = field(default_factory=dict)
    best: dict[str, Any] = field(default_factory=dict)


class Meter:
    """Sums named scalars on the device; sharing and reading them are the only waits."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._count = 0

    def add(self, terms: dict[str, Tensor]) -> None:
        """Add one observation of each term."""
        for name, value in terms.items():
            # a copy even of float64: a CUDA graph overwrites its outputs in the next step
            value = value.detach().to(torch.float64, copy=True)
            self._sums[name] = self._sums[name] + value if name in self._sums else value
        self._count += 1

    def share(self, accelerator: Accelerator) -> None:
        """Take the mean over the processes, which all call this. They may add their own and share again."""
        if accelerator.num_processes > 1 and self._sums:
            shared = cast(Tensor, accelerator.reduce(torch.stack(list(self._sums.values())), "mean"))
            self._sums = dict(zip(self._sums, shared.unbind(), strict=True))

    def means(self) -> dict[str, float]:
        """The means since the last reset: of this process until they are shared. Waits for the device."""
        if not self._count:
            return {}
        values = torch.stack(list(self._sums.values())).tolist()
        return {name: value / self._count for name, value in zip(self._sums, values, strict=True)}

    def reset(self) -> None:
        """Start anew."""
        self._sums, self._count = {}, 0

    def state_dict(self) -> dict[str, Any]:
        """Sums and count."""
        return {"sums": dict(self._sums), "count": self._count}

    def load_state_dict(self, state: dict[str, Any], device: torch.device) -> None:
        """Take sums and count from a saved state."""
        self._sums = {name: value.to(device) for name, value in state["sums"].items()}
        self._count = state["count"]


class Loop:
    """Trains a task over a loader's steps. Parts without gradient stay as they are, in eval mode; where nothing has a
    gradient, the steps only observe.

    Args:
        task: what is trained.
        loader: the training batches.
        val_loader: the validation images, each once; None: nothing is evaluated, and no epoch is the best one.
        options: of the run.
        accelerator: devices and processes.
        folder: where the run is written.
        header: what results.json says of the run besides the figures.
        identity: what a resumed run is compared with.

    Raises:
        ValueError: something is to be compiled and there is no compiler.
    """

    def __init__(
        self,
        task: Task,
        loader: Loader,
        val_loader: Loader | None,
        options: TrainingOptions,
        accelerator: Accelerator,
        folder: RunFolder,
        header: dict[str, Any],
        identity: dict[str, Any] | None = None,
    ) -> None:
        self.task, self.loader, self.val_loader = task, loader, val_loader
        self._loaders = (loader,) if val_loader is None else (loader, val_loader)
        self.options, self.accelerator, self.folder, self.header = options, accelerator, folder, header
        self.identity = identity or {"options": {}, "contents": {}}
        task.to(accelerator.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        if options.sync_bn and accelerator.num_processes > 1:
            from timm.layers.norm_act import convert_sync_batchnorm  # torch's own drops what timm's norms do besides

            convert_sync_batchnorm(task)  # in place, as no norm is the task itself
        self._trains = any(values.requires_grad for values in task.parameters())
        optimizer = make_optimizer(
            options.optimizer, parameter_groups(task, options.no_decay_norms), accelerator.device
        )
        self.base_rates = [group["lr"] for group in optimizer.param_groups]
        if self._trains:
            # accelerate leaves these to what holds them
            DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(task, task.local_buffers)
            self.model, self.optimizer = accelerator.prepare(task, optimizer)
        else:  # DDP refuses what has no gradient to share
            self.model = accelerator.prepare_model(task, evaluation_mode=True)
            self.optimizer = accelerator.prepare(optimizer)
        check_compiler(options.compile)
        if options.compile != "off":
            # in place, so that weights keep their names; traced in the first step, inside DDP, which cuts it at buckets
            task.compile(mode=options.compile)
        assert len(task.nets) == 1 or not any(name.endswith("-ema") for name in task.nets), "names of averages"
        self.averages = {name: MovingAverage(net, options.ema) for name, net in task.nets.items() if options.ema}
        self.meter, self.epoch_meter = Meter(), Meter()
        self.progress = _Progress()
        self.alone = True  # whether no other loop takes part in the steps
        self._batches: Sequence[Batch] = ()  # of the last step
        self._first_state: dict[str, Any] | None = None  # on the host, until a state is saved
        self.checkpoints = CheckpointWriter(folder.check_there)
        self._best_due = False  # weights of the best epoch are to be written with the next checkpoint
        self._fell_back = False  # on the state before the last one
        self._saved_at = time.monotonic()
        self.stops = StopSignals(accelerator)
        self.replaced_files: dict[str, str] = {}  # of both splits and every process
        self.clock = _Clock(loader, accelerator.device)
        self._threads = torch.get_num_threads()  # outside of this run
        self.steps_per_epoch = loader.sampler.steps_per_epoch
        self.total_steps = options.length * self.steps_per_epoch
        milestones = [options.epoch_factor * epoch for epoch in options.schedule.milestones]
        self.schedule = replace(options.schedule, milestones=milestones)

    # ------------------------------------------------------------------------------------------ the step

    def next_batches(self) -> list[Batch]:
        """The microbatches of the next step, which several loops may share.

        Raises:
            BadFileError, Interrupted: as `StopSignals.together`.
        """
        batches = self.stops.together(lambda: [self.loader.next() for _ in range(self.options.accumulation)])
        if self.options.compile != "off":
            # CUDA graphs may now overwrite the last step's outputs. Not between microbatches, whose gradients add up.
            torch.compiler.cudagraph_mark_step_begin()
        return batches

    def step(self, batches: Sequence[Batch] | None = None) -> None:
        """One optimizer step. Nothing in here waits for the device, but for an optimizer that is not fused in fp16: the
        scaler asks first whether gradients have overflowed.

        Args:
            batches: its microbatches; default: the next ones.

        Raises:
            BadFileError, Interrupted: as `next_batches`; nothing was done.
        """
        batches = self.next_batches() if batches is None else batches
        step, rank = self.progress.step, self.accelerator.process_index
        factor = learning_rate_factor(self.schedule, step, self.steps_per_epoch, self.total_steps)
        for group, rate in zip(self.optimizer.param_groups, self.base_rates, strict=True):
            group["lr"] = rate * factor
        # whatever a net draws (dropout) is a function of the step too
        torch.manual_seed(step_seed(self.options.net_seed, step, rank))
        for part, batch in enumerate(batches, start=1):
            with torch.no_grad():
                self.clock.mark()
                inputs = self.task.prepare(batch, step / self.steps_per_epoch)
                self.clock.mark()
            last = part == len(batches)
            with nullcontext() if last else self.accelerator.no_sync(self.model):
                terms = self.model(inputs)
                if self._trains:
                    self.accelerator.backward(terms["loss"] / len(batches))
            self.meter.add(terms)
            self.epoch_meter.add(terms)
        if self._trains:
            if self.options.clip_grad_norm is not None:
                self.accelerator.clip_grad_norm_(self.model.parameters(), self.options.clip_grad_norm)
            self.optimizer.step()
            self.optimizer.zero_grad()
            for name, average in self.averages.items():
                average.update(self.task.nets[name])
        self.progress.step += 1
        self._batches = batches

    # ------------------------------------------------------------------------------------------- the run

    def run(self) -> dict[str, Any]:
        """Train to the end, from the start or from where `load` put it; as `run_together`, alone.

        Returns:
            the content of results.json.
        """
        return run_together([self])[0]

    def begin(self) -> None:
        """Before the first step: do what a stop in the middle of an evaluation has left."""
        self.model.train()
        if self.progress.step == 0:
            self._first_state = on_host(self.state_dict())
        self._saved_at = time.monotonic()
        self.clock.restart(self.progress.step)
        if self.progress.step == (self.progress.epochs + 1) * self.steps_per_epoch:
            self.end_epoch()

    def follow(self, bar: tqdm) -> None:
        """After a step: log, evaluate and save where it is time."""
        step, options = self.progress.step, self.options
        end_of_epoch = step % self.steps_per_epoch == 0
        logged = step % options.log_every == 0 or end_of_epoch
        due = options.checkpoint_every and step % options.checkpoint_every == 0
        if logged:
            self._log_interval(bar)
            self.checkpoints.check()
        if end_of_epoch:
            self.end_epoch()
            self.clock.restart()
        elif due or (logged and self._minutes_are_over()):
            self.save(wait=False)

    def _minutes_are_over(self) -> bool:
        """Whether it is time for a checkpoint, by the main process's clock; all of them ask, where they meet anyway."""
        if not self.options.checkpoint_minutes:
            return False
        over = [time.monotonic() - self._saved_at >= 60 * self.options.checkpoint_minutes]
        return broadcast_object_list(over)[0]

    def close(self) -> None:
        """Let go of what the run holds, whether it has come to its end or not."""
        self.checkpoints.close()
        torch.set_num_threads(self._threads)
        for loader in self._loaders:
            loader.close()
        self.folder.close()
        if self.options.compile != "off":
            torch.compiler.reset()  # what many runs of one process leave behind would pass torch's limit

    def finish(self) -> dict[str, Any]:
        """Write what there is after the last step, and return the content of results.json."""
        results = {**self._results(finished=True), "sha256": self.folder.checksums()}
        self.folder.results(results)
        if self.accelerator.is_main_process:
            self.task.finish(self.folder.path)
        return results

    def _log_interval(self, bar: tqdm) -> None:
        self.meter.share(self.accelerator)
        terms = self.meter.means()
        if found := self._wrong_loss(terms):
            self._diverge(found)
        self.meter.reset()
        images = self.clock.steps(self.progress.step) * self.loader.sampler.batch_size
        seconds, waited, asked = self.clock.read()
        entry = {
            "epoch": self.progress.step / self.steps_per_epoch,
            "train": _finite(terms),
            "lr": self.optimizer.param_groups[0]["lr"],
            "images_per_second": images / seconds,
            "data_wait_share": waited / seconds,
            "teacher_share": asked / seconds,
        }
        self.folder.log(self.progress.step, entry)
        bar.set_postfix(loss=f"{terms['loss']:.4f}", images_s=f"{images / seconds:.0f}", refresh=False)

    def end_epoch(self) -> None:
        """Evaluate where it is time, log the epoch, and save."""
        self._check_finite()
        progress, epoch = self.progress, self.progress.step // self.steps_per_epoch
        done = progress.step == self.total_steps
        if done or epoch % self.options.eval_every == 0:
            val = None if self.val_loader is None else self._evaluate(self.val_loader)
            self.epoch_meter.share(self.accelerator)
            train, metrics = _finite(self.epoch_meter.means()), self.task.metrics()
            progress.last = {"epoch": epoch, "train": train, "val": val, **metrics}
            if val is not None and (not progress.best or _rank(val) > _rank(progress.best["val"])):
                progress.best = progress.last
                self._best_due = True
            # of the whole epoch, by a name of its own: "train" is of an interval
            self.folder.log(progress.step, {"epoch": epoch, "epoch_train": train, "val": val, **metrics})
        self.epoch_meter.reset()
        progress.epochs = epoch
        self.save(wait=False)
        self.folder.results(self._results(finished=False))

    def _evaluate(self, loader: Loader) -> dict[str, Any]:
        """The figures of the first net; of several those of each too. Raises ValueError where a loss is not finite."""
        nets = {name: average.module for name, average in self.averages.items()} or self.task.nets
        self._share_buffers(nets.values())
        found = evaluate(nets, loader, self.accelerator, self.task.evaluate, stops=self.stops)
        if self.accelerator.device.type == "cuda":
            loader.close()  # its pipeline's buffers are the training's until the next evaluation
        for name, figures in found.items():
            if not math.isfinite(figures["loss"]):
                what = "the loss" if len(found) == 1 else f"the loss of {name}"
                raise ValueError(
                    f"{what} on the validation images is {figures['loss']} at step {self.progress.step}: training has "
                    "diverged; lower --optimizer.lr, set --clip_grad_norm or --schedule.warmup_epochs"
                )
        first = next(iter(found.values()))
        return first if len(found) == 1 else {**first, "nets": found}

    def _share_buffers(self, nets: Iterable[nn.Module]) -> None:
        """Take the main process's running statistics, as every training forward does, so that all evaluate one net."""
        if self.accelerator.num_processes > 1:
            for buffer in chain.from_iterable(net.buffers() for net in nets):
                torch.distributed.broadcast(buffer, src=0)

    def _results(self, finished: bool) -> dict[str, Any]:
        progress = self.progress
        return {
            "finished": finished,
            "steps": progress.step,
            "epochs": progress.step / self.steps_per_epoch,
            "last": progress.last,
            "best": progress.best,
            "best_is": "the epoch with the highest top1 on the validation split itself, among equal ones with the "
            "lowest loss; compare runs by last"
            if self.val_loader is not None
            else "none: there are no labelled images to evaluate on",
            "evaluated": self._file(next(iter(self.task.nets)), averaged=bool(self.averages)),
            "compile": self.options.compile,
            "replaced": {  # images of each split, by all processes
                "train": len(self.loader.replaced),
                "val": (progress.last.get("val") or {}).get("replaced", 0),
            },
            "replaced_files": self.replaced_files,
            **self.header,
            "processes": self.accelerator.num_processes,
            "versions": versions(self.accelerator.device),
        }

    # ----------------------------------------------------------------------------------- numbers that are none

    def _wrong_loss(self, terms: dict[str, float]) -> str | None:
        """What is not finite of terms, in words. A scaler skips the steps that overflow in fp16, but not for ever."""
        scaler = self.accelerator.scaler
        if scaler is not None:
            scale = scaler.get_scale()
            return f"in fp16 gradients overflow even at a loss scale of {scale:.1g}" if scale < _LEAST_SCALE else None
        wrong = {name: value for name, value in terms.items() if not math.isfinite(value)}
        if "loss" not in wrong:
            return None
        parts = ", ".join(f"{name} {value}" for name, value in wrong.items() if name != "loss")
        return f"the loss is {wrong['loss']}" + (f" ({parts})" if parts else "")

    def wrong_weight(self) -> str | None:
        """The first weight, running statistic or momentum that is not finite, in words. Waits for the device."""
        named = list(self.task.named_parameters())
        for name, values in tuple(named):
            kept = self.optimizer.state.get(values, {}).items()
            named += [(f"{key} of {name}", kept) for key, kept in kept if isinstance(kept, Tensor) and kept.dim()]
        for name, net in self.task.nets.items():
            # other buffers may hold infinities by design
            named += [(f"{name}.{key}", value) for key, value in net.named_buffers() if "running_" in key]
        for name, average in self.averages.items():
            named += [(f"{name}-ema.{key}", value) for key, value in average.module.named_parameters()]
        # a sum takes a small part of the time, and is finite where all are, unless it overflows
        finite = torch.stack([value.detach().sum().float() for _, value in named]).isfinite().tolist()
        doubtful = [pair for pair, good in zip(named, finite, strict=True) if not good]
        return next((f"{name} is not finite" for name, value in doubtful if not value.isfinite().all()), None)

    def _wrong_forward(self) -> str | None:
        """Whether weights that are finite give logits that are not, in words: no run goes on from there."""
        if not (self._trains and self._batches) or self.accelerator.scaler is not None:
            return None
        for name, net in self.task.nets.items():
            with torch.no_grad(), self.accelerator.autocast(), batch_statistics(net):
                if not torch.isfinite(net(self._batches[-1].pixels[:_LOOKED_AT])).all():
                    return f"what {name} gives for images of the last step is not finite"
        return None

    def _check_finite(self) -> None:
        """Look at all that a state holds, before it is saved. All processes call this, with meters that are shared.

        Raises:
            ValueError: it is not finite.
        """
        found = self._anywhere(self._wrong_loss(self.meter.means()) or self.wrong_weight() or self._wrong_forward())
        if words := next(filter(None, found), None):
            self._diverge(words)

    def _anywhere(self, found: str | None) -> list[str | None]:
        """What each process has found. All of them call this."""
        return gather_object([found]) if self.accelerator.num_processes > 1 else [found]

    def _diverge(self, words: str) -> NoReturn:
        """End a run that is not finite any more, and write its first such step down, for `dalikd replay`.

        Good steps keep nothing for that: it is found by training again from the last finite state on. All processes
        call this.

        Raises:
            ValueError: always.
        """
        step, batches, rank = self.progress.step, self._batches, 0
        self.checkpoints.wait()
        self.accelerator.wait_for_everyone()  # the main process alone writes
        state = self._read()[0] if self.folder.has_state() else self._first_state
        saved = state["step"] if state is not None and state is not self._first_state else None
        if self.alone and state is not None and step - state["step"] <= _TRAINED_AGAIN:
            self.take(state)
            while self.progress.step < step:
                state = on_host(self.state_dict())
                self.meter.reset()
                self.step()
                batches = self._batches
                found = self._anywhere(self._wrong_loss(self.meter.means()) or self.wrong_weight())
                if any(found):
                    rank, words = next((rank, words) for rank, words in enumerate(found) if words)
                    break
            else:  # what comes next on these weights is
                state = on_host(self.state_dict())
            step = state["step"] + 1
        error = ValueError(
            f"{words} at step {step}: training has diverged; lower --optimizer.lr, set --clip_grad_norm or "
            "--schedule.warmup_epochs"
            + ("" if saved is None else f", and go on from step {saved} with --resume {self.folder.path}")
        )
        path = self.folder.path / f"nan-step{step}.pt"

        def write() -> None:
            if rank == self.accelerator.process_index:
                content = {"step": step, "words": words, "state": state, **self._describe_step(batches)}
                write_atomically(path, lambda file: torch.save(on_host(content), file))

        save_after(error, write, f"what the step needs to be run again is in {path}: dalikd replay {path}")
        self.accelerator.wait_for_everyone()  # a launcher ends the others with the first that ends
        raise error

    def _describe_step(self, batches: Sequence[Batch]) -> dict[str, Any]:
        """All that a step of this process takes besides the state: plain values and tensors."""
        source, options = self.loader.source, self.identity["options"]
        told = [options, *(options.get("teachers") or ())]
        files = [str(value) for part in told for name, value in part.items() if name.split(".")[-1] == "weights"]
        return {
            "options": options,
            "processes": self.accelerator.num_processes,
            "steps_per_epoch": self.steps_per_epoch,
            "total_steps": self.total_steps,
            "batches": [
                {
                    **{
                        name: getattr(batch, name)
                        for name in ("images", "augmented", "labels", "ids", "total", "extras")
                    },
                    "mix": [draws._asdict() for draws in batch.mix],
                    "paths": [printable(source.path(row)) for row in batch.ids.tolist()],
                }
                for batch in map(self.task.own_draws, batches)
            ],
            "source": {
                **{name: getattr(source, name) for name in ("name", "split", "classes", "mean", "std", "image_size")},
                "labels": torch.from_numpy(source.labels),
                "fingerprint": source.fingerprint,
            },
            "files": {
                file: torch.frombuffer(bytearray(Path(file).read_bytes()), dtype=torch.uint8)
                for file in files
                if Path(file).is_file()
            },
        }

    # ------------------------------------------------------------------------------------------ the state

    def save(self, *, wait: bool = True) -> None:
        """Write the student's weights and the state. At a step's end the state is the same on every process, once the
        meters are shared: all of them call this, and the main process writes.

        Args:
            wait: until it is written; else a thread writes copies, while the training goes on.

        Raises:
            OSError, ValueError: as `CheckpointWriter.save`.
        """
        self.meter.share(self.accelerator)
        self.epoch_meter.share(self.accelerator)
        self._check_finite()
        # every process must come here: what one of them has replaced, the main process writes down
        self.replaced_files |= replaced_files(self._loaders, self.accelerator)
        if self.accelerator.is_main_process:
            self.write(wait=wait, checked=True)

    def write(self, *, wait: bool = True, checked: bool = False) -> None:
        """The same by the main process alone, with meters that are shared already.

        Args:
            wait: as of `save`.
            checked: all of it is known to be finite.

        Raises:
            ValueError: the weights or the loss are not finite; what was saved before stays.
        """
        if not checked and (found := self._wrong_loss(self.meter.means()) or self.wrong_weight()):
            raise ValueError(f"{found}, and not saved")
        weights = self._weights("last") | (self._weights("best") if self._best_due else {})
        paths = self.folder.state_file, self.folder.previous_state_file
        self.checkpoints.save(weights, self.state_dict(), paths, wait=wait)
        self._best_due, self._saved_at, self._first_state = False, time.monotonic(), None

    def state_dict(self) -> dict[str, Any]:
        """Everything a run needs to go on exactly."""
        scaler = self.accelerator.scaler
        return {
            "step": self.progress.step,
            "total_steps": self.total_steps,
            "threads": torch.get_num_threads(),
            "epochs": self.progress.epochs,
            "identity": self.identity,
            "last": self.progress.last,
            "best": self.progress.best,
            "task": self.task.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "optimizer_class": type(self.optimizer.optimizer).__name__,
            "scaler": scaler.state_dict() if scaler is not None else None,
            "averages": {name: average.state_dict() for name, average in self.averages.items()},
            "meter": self.meter.state_dict(),
            "epoch_meter": self.epoch_meter.state_dict(),
            "loader": self.loader.state_dict(),
            "val_loader": None if self.val_loader is None else self.val_loader.state_dict(),
            "replaced_files": dict(self.replaced_files),
        }

    def saved_step(self) -> int:
        """How many steps the saved state has done."""
        return int(self._read()[0]["step"])

    def _read(self) -> tuple[dict[str, Any], str]:
        trained = [name for name, values in self.task.named_parameters() if values.requires_grad]
        return read_newest((self.folder.state_file, self.folder.previous_state_file), trained)

    def load(self) -> None:
        """Take up the folder's saved state, and say what goes on otherwise than before.

        Raises:
            FileNotFoundError: there is none.
            ValueError: it belongs to another run.
        """
        state, damage = self._read()
        with reading(self.folder.state_file):
            changes = check_same_run(state.get("identity", {}), self.identity, self.folder.path) + self.take(state)
        if found := self.wrong_weight():
            raise ValueError(
                f"{self.folder.state_file}: {found}: the run had diverged when it was saved; start it anew with "
                "--overwrite true and a lower --optimizer.lr"
            )
        self._fell_back = bool(damage)
        if damage:
            self.accelerator.print(f"{damage}: resumed from the state before it, of step {state['step']}", flush=True)
        if changes:
            self.accelerator.print(f"resumed, but otherwise than before: {'; '.join(changes)}", flush=True)

    def take(self, state: dict[str, Any]) -> list[str]:
        """Take up a state. Returns what goes on otherwise than before, in words."""
        changes: list[str] = []
        if self.val_loader is not None and state.get("val_loader"):  # else nothing was evaluated before
            self.val_loader.check_images(state["val_loader"])
        try:
            self.task.load_state_dict(_of_this_form(state)["task"])
        except RuntimeError as error:
            raise ValueError(
                f"{self.folder.state_file} belongs to another --model than {self.options.model}"
            ) from error
        self._load_optimizer(state)
        if self.accelerator.scaler is not None and state["scaler"] is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        for name, average in self.averages.items():
            if name in state["averages"]:
                average.load_state_dict(state["averages"][name])
        self.meter.load_state_dict(state["meter"], self.accelerator.device)
        self.epoch_meter.load_state_dict(state["epoch_meter"], self.accelerator.device)
        self.progress = _Progress(state["step"], state["epochs"], state["last"], state["best"])
        self.checkpoints.digests = dict(state.get("digests", {}))
        position = self.progress.step * self.options.accumulation
        self.loader.load_state_dict({**state["loader"], "position": position})
        self.replaced_files = dict(state.get("replaced_files", {}))
        if (planned := state.get("total_steps", self.total_steps)) != self.total_steps:
            ended = "finished" if self.progress.step >= planned else "planned"
            steps = self.progress.step, self.steps_per_epoch, self.total_steps
            rate = self.base_rates[0] * learning_rate_factor(self.schedule, *steps)
            changes.append(
                f"a run {ended} with {planned} steps has {self.total_steps} now, and the {self.options.schedule.name} "
                f"schedule is that of the new length: the learning rate goes on with {rate:.4g}"
            )
        return changes + self._take_threads(state.get("threads", torch.get_num_threads()))

    def mend(self) -> None:
        """After `load`, by the main process, in a folder that is locked for the run: write the weights that belong to
        the state where others lie, and say which of the best epoch's cannot be had again."""
        if self._fell_back:  # else the next checkpoint would keep what cannot be read
            self.folder.previous_state_file.replace(self.folder.state_file)
        progress, digests = self.progress, self.checkpoints.digests
        kept = {"last": self._weights("last"), "best": self._weights("best") if progress.best else {}}
        for name, weights in kept.items():
            others = [
                path
                for path in weights
                if not path.is_file() or file_digest(path) != digests.get(f"{name}/{path.name}", "")
            ]
            if others and (name == "last" or progress.step == progress.best["epoch"] * self.steps_per_epoch):
                self.checkpoints.write_weights(weights)
            elif digests and others:
                print(
                    f"{others[0]} is not what was saved of epoch {progress.best['epoch']}, the best one so far: it is "
                    "damaged, or of a later epoch, which is trained again now",
                    flush=True,
                )

    def _take_threads(self, saved: int) -> list[str]:
        """Compute with as many threads as before, on which the last bits depend; say so where the user wants others."""
        now = torch.get_num_threads()
        if self.accelerator.device.type != "cpu" or saved == now:
            return []
        if "OMP_NUM_THREADS" in os.environ or saved > len(os.sched_getaffinity(0)):
            return [f"{now} thread(s) of torch, not {saved}: the last bits of the weights come out otherwise"]
        torch.set_num_threads(saved)
        self._threads = now
        return [f"{saved} thread(s) of torch, not {now}, as the run had: the last bits of the weights depend on them"]

    def _load_optimizer(self, state: dict[str, Any]) -> None:
        """Take the optimizer's state; its settings stay those of this run's options."""
        name = type(self.optimizer.optimizer).__name__
        if state["optimizer_class"] != name:
            raise ValueError(
                f"{self.folder.state_file} belongs to the optimizer {state['optimizer_class']}, now it is {name}: "
                "resume with the same"
            )
        settings = [
            {key: value for key, value in group.items() if key != "params"} for group in self.optimizer.param_groups
        ]
        self.optimizer.load_state_dict(state["optimizer"])
        for group, own in zip(self.optimizer.param_groups, settings, strict=True):
            group.update(own)

    def _weights(self, name: str) -> dict[Path, Weights]:
        """The files of a folder of the run and what they hold."""
        folder, classes, found = self.folder.path / name, self.loader.source.classes, dict[Path, Weights]()
        for net_name, net in self.task.nets.items():
            saved = {self._file(net_name): net.model}
            if average := self.averages.get(net_name):
                saved[self._file(net_name, averaged=True)] = average.module.get_submodule("model")
            for file, model in saved.items():
                found[folder / file] = weights_of(model, net.normalisation, classes)
                if isinstance(model, AuxiliaryNet):  # what a plain net of its name loads
                    backbone = f"{file.removesuffix('.safetensors')}-backbone.safetensors"
                    found[folder / backbone] = weights_of(model.backbone, net.normalisation, classes)
        return found

    def _file(self, net: str, *, averaged: bool = False) -> str:
        """Where a net's weights, or their average, lie in a run's folder."""
        if not averaged:
            return f"{net}.safetensors"
        return "ema.safetensors" if len(self.task.nets) == 1 else f"{net}-ema.safetensors"


def run_together(loops: Sequence[Loop]) -> list[dict[str, Any]]:
    """Train loops over the same steps to their end, each from the start or from where `load` put it.

    They share loader, validation images and processes; each does with a step's batches what it would do alone. One that
    is ahead of the others waits for them.

    Returns:
        the content of results.json of each.

    Raises:
        BadFileError: an image cannot be decoded; the state is saved.
        Interrupted: a signal came; the state is saved. Both end all processes, at one step.
        MemoryError: of the device, or of the host; the state is saved by the main process, if it is the one. A step
            that was under way is done again, and running statistics and metrics have seen a part of it twice.
        ValueError: training has diverged; that of others goes on to its end first.
    """
    first, failed = loops[0], dict[Loop, ValueError]()
    how = f"--resume {first.folder.path}" if len(loops) == 1 else "the same command"

    def save(one: Callable[[Loop], None]) -> None:
        for loop in loops:
            if loop not in failed:
                one(loop)

    try:
        with first.stops:  # until the state is saved: a launcher hands on what its processes have had already
            try:
                _train(loops, failed)
            except (BadFileError, Interrupted) as stop:
                save_after(stop, lambda: save(Loop.save), f"go on with {how}")
                first.accelerator.wait_for_everyone()  # a launcher ends the others with the first that ends
                raise
            except (RuntimeError, MemoryError) as error:
                if (words := lack_of_memory(error)) is None:
                    raise
                lack = MemoryError(words)
                if first.accelerator.is_main_process:  # the others may not have met it, and wait
                    save_after(lack, lambda: save(Loop.write), f"the state is saved, go on with {how}")
                raise lack from error
    finally:
        for loop in loops:
            loop.close()
    results = [loop.finish() for loop in loops if loop not in failed]
    if failed:
        raise ValueError("; ".join(map(str, failed.values())))
    return results


def _train(loops: Sequence[Loop], failed: dict[Loop, ValueError]) -> None:
    """Do the steps, and wait for the checkpoints that are being written; of two errors neither hides the other."""
    try:
        _run_steps(loops, failed)
    except BadFileError:
        raise
    except (ValueError, OSError) as error:
        for loop in loops:
            try:
                loop.checkpoints.wait()
            except (ValueError, OSError) as second:
                raise type(second)(f"{error}; {second}") from error
        raise
    for loop in loops:
        if loop not in failed:
            loop.checkpoints.wait()


def _run_steps(loops: Sequence[Loop], failed: dict[Loop, ValueError]) -> None:
    first, start = loops[0], min(loop.progress.step for loop in loops)
    name = first.folder.path.name if len(loops) == 1 else f"{len(loops)} students"
    with progress_bar(first.accelerator, name, total=first.total_steps, initial=start, unit="step") as bar:
        for loop in loops:
            loop.alone = len(loops) == 1
            loop.begin()
        for step in range(start, first.total_steps):
            batches = first.next_batches()
            for loop in loops:
                if loop.progress.step == step and loop not in failed:
                    try:
                        loop.step(batches)
                        loop.follow(bar)
                    except ValueError as error:
                        if len(loops) == 1:
                            raise
                        failed[loop] = ValueError(f"{loop.folder.path.name}: {error}")
            bar.update()
        first.stops.together(lambda: None)  # a signal in the last step is for what comes after the run


class _Clock:
    """Wall time of an interval of training, and what of it was waited for data and went to the teacher."""

    def __init__(self, loader: Loader, device: torch.device) -> None:
        self._loader, self._on_gpu = loader, device.type == "cuda"
        self.restart(0)

    def mark(self) -> None:
        """Where the teacher begins (mixing, teacher pass, picking), and where it ends. Nothing waits for the device."""
        mark: Any = torch.cuda.Event(enable_timing=True) if self._on_gpu else time.perf_counter()
        if self._on_gpu:
            mark.record()
        self._marks.append(mark)

    def restart(self, step: int | None = None) -> None:
        """Leave out what happened since the last reading (evaluation, checkpoints); `step` are done."""
        self._step = self._step if step is None else step
        self._started, self._waited = time.perf_counter(), self._loader.wait_seconds
        self._marks: list[Any] = []

    def steps(self, step: int) -> int:
        """Steps since the last call."""
        done, self._step = step - self._step, step
        return done

    def read(self) -> tuple[float, float, float]:
        """Seconds since the last reading, and how many of them went into waiting for data and to the teacher; once the
        device has done what they hold."""
        started, waited, marks = self._started, self._waited, iter(self._marks)
        pairs = zip(marks, marks, strict=True)
        asked = sum(begin.elapsed_time(end) / 1000 if self._on_gpu else end - begin for begin, end in pairs)
        self.restart()
        return self._started - started, self._waited - waited, asked


def step_seed(net_seed: int, step: int, rank: int) -> int:
    """The seed of what nets draw in a step."""
    return (net_seed * 0x9E3779B97F4A7C15 + step * 0x100000 + rank) % (1 << 63)


def learning_rate_factor(config: ScheduleConfig, step: int, steps_per_epoch: int, total_steps: int) -> float:
    """The factor on the base learning rate at a step, a pure function of it.

    Args:
        config: the schedule.
        step: optimizer steps done so far.
        steps_per_epoch: optimizer steps in an epoch.
        total_steps: optimizer steps in the whole training.
    """
    warmup = round(config.warmup_epochs * steps_per_epoch)
    if step < warmup:
        return (step + 1) / warmup
    if config.name == "multistep":
        return config.gamma ** sum(step >= round(milestone * steps_per_epoch) for milestone in config.milestones)
    if config.name == "cosine":
        progress = (step - warmup) / max(total_steps - warmup, 1)
        return config.final + (1 - config.final) * (1 + math.cos(math.pi * min(progress, 1.0))) / 2
    return 1.0


def parameter_groups(task: nn.Module, no_decay_norms: bool) -> Iterable[Any]:
    """What an optimizer takes of a task: all that is trained, with or without weight decay for biases and norms."""
    parameters = [parameter for parameter in task.parameters() if parameter.requires_grad]
    if not parameters:
        return [nn.Parameter(torch.zeros(0))]  # optimizers refuse to have nothing
    if not no_decay_norms:
        return parameters
    decayed = [parameter for parameter in parameters if parameter.dim() > 1]
    others = [parameter for parameter in parameters if parameter.dim() <= 1]
    return [{"params": decayed}, {"params": others, "weight_decay": 0.0}]


def make_optimizer(
    factory: Callable[..., torch.optim.Optimizer], parameters: Iterable[Any], device: torch.device
) -> torch.optim.Optimizer:
    """An optimizer; on a GPU one that updates all weights in a kernel and reads no overflow, where it is left open."""
    given = getattr(factory, "keywords", {})
    settled = given.get("fused", False) is not None or given.get("foreach") or given.get("differentiable")
    if device.type != "cuda" or settled or type(factory([nn.Parameter(torch.zeros(1, 1))])) not in (SGD, Adam, AdamW):
        return factory(parameters)
    return factory(parameters, fused=True)


def on_host(state: Any) -> Any:
    """A copy of nested dicts and lists whose tensors lie in the host's memory."""
    if isinstance(state, Tensor):
        return state.detach().to("cpu", copy=True)
    if isinstance(state, dict):
        return {name: on_host(value) for name, value in state.items()}
    return [on_host(value) for value in state] if isinstance(state, list | tuple) else state


def _finite(terms: dict[str, float]) -> dict[str, float | None]:
    """Without numbers that JSON does not have: in fp16 a step that overflows, and is skipped, may give one."""
    return {name: value if math.isfinite(value) else None for name, value in terms.items()}


def _of_this_form(state: dict[str, Any]) -> dict[str, Any]:
    """A state as it is saved today: earlier ones kept one average, and a task's figures beside the task."""
    if "method" in state:
        state["task"]["_extra_state"] = state.pop("method")
        state["averages"] = {"student": average} if (average := state.pop("average")) is not None else {}
    return state


def _rank(val: dict[str, Any]) -> tuple[float, float]:
    """What makes an epoch the best one: its accuracy, among equal ones its loss."""
    return val["top1"], -val["loss"]
