"""Which rows make a batch: a pure function of (seed, microbatch index).

An epoch is one order of all rows. A step of `batch_size` takes consecutive positions of it, cut into
`accumulation` x `world` microbatches; so a step's rows are the same for every number of processes, and a position in
training is one number: the microbatches that this process has consumed.
"""

from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace

import numpy as np

from dalikd.pipelines.draws import Microbatch, permutation

__all__ = ["Sampler"]

_NO_ROWS = np.empty(0, np.int64)


class Sampler:
    """Orders rows and cuts them into microbatches.

    Args:
        size: rows in the data set.
        batch_size: rows of one step, over all processes and accumulated microbatches.
        seed: of the order.
        shuffle: a new order each epoch; otherwise 0, 1, 2, …
        drop_last: leave out the epoch's short last batch (training); otherwise every row comes exactly once.
        world: processes.
        rank: this process.
        accumulation: microbatches a step and process.
        group: microbatches must be whole multiples of so many rows (the mix group); 1 for no such rule.
        repeat: after so many epochs the orders, and the draws made for them, come again; None for never.

    Raises:
        ValueError: the sizes do not fit together.
    """

    def __init__(
        self,
        size: int,
        batch_size: int,
        seed: int = 0,
        *,
        shuffle: bool = True,
        drop_last: bool = True,
        world: int = 1,
        rank: int = 0,
        accumulation: int = 1,
        group: int = 1,
        repeat: int | None = None,
    ) -> None:
        _check_sizes(size, batch_size, world, accumulation, group, drop_last)
        self.size, self.batch_size, self.seed = size, batch_size, seed
        self.shuffle, self.world, self.rank, self.accumulation = shuffle, world, rank, accumulation
        self.drop_last, self.repeat = drop_last, repeat
        self.microbatch = batch_size // (world * accumulation)
        self.steps_per_epoch = size // batch_size if drop_last else -(-size // batch_size)
        self.microbatches_per_epoch = self.steps_per_epoch * accumulation  # of this process
        self._orders: dict[int, Future[np.ndarray]] = {}
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="dalikd-order")

    @property
    def reads_shares(self) -> bool:
        """Whether each process reads and shuffles a share of the shards of its own: in training, where the short last
        batch is left out, so that every share is long enough. Else all of them read everything, in storage order."""
        return self.shuffle and self.drop_last

    def order(self, epoch: int) -> np.ndarray:
        """The row at each position of an epoch, int64 [size]; the next epoch's is prepared in a thread."""
        if not self.shuffle:
            epoch = 0
        following = epoch + 1 if self.repeat is None else (epoch + 1) % self.repeat
        wanted = (epoch, following) if self.shuffle else (0,)
        known = self._orders  # replaced whole: two threads may be here
        self._orders = orders = {
            number: known.get(number) or self._thread.submit(self._make_order, number) for number in wanted
        }
        return orders[epoch].result()

    def __getitem__(self, index: int) -> Microbatch:
        """This process's microbatch number `index` since the start of training."""
        place = self.place(index)
        order = self.order(place.epoch)
        rows = order[place.start : place.start + place.valid] if place.valid else order[:1]
        return replace(place, rows=rows)

    def place(self, index: int) -> Microbatch:
        """Where microbatch number `index` lies, without its rows."""
        epoch, within = divmod(index, self.microbatches_per_epoch)
        step, part = divmod(within, self.accumulation)
        first = step * self.batch_size + part * self.world * self.microbatch
        start = first + self.rank * self.microbatch
        stop = min(start + self.microbatch, self.size)
        valid = max(stop - start, 0)
        total = max(min(first + self.world * self.microbatch, self.size) - first, 0)
        return Microbatch(index, epoch if self.repeat is None else epoch % self.repeat, start, _NO_ROWS, valid, total)

    def _make_order(self, epoch: int) -> np.ndarray:
        return permutation(self.seed, epoch, self.size) if self.shuffle else np.arange(self.size)


def _check_sizes(size: int, batch_size: int, world: int, accumulation: int, group: int, drop_last: bool) -> None:
    parts = world * accumulation
    advice = _fitting(size if drop_last else None, parts, group)
    if batch_size < 1:
        raise ValueError(f"--batch_size {batch_size}: give at least {parts}: {advice}")
    if drop_last and batch_size > size:
        raise ValueError(
            f"--batch_size {batch_size} is larger than the data set ({size} images): no full batch; {advice}"
        )
    if batch_size % parts:
        raise ValueError(
            f"--batch_size {batch_size} cannot be divided evenly over {world} process(es) x --accumulation "
            f"{accumulation}: use a multiple of {parts}{'' if group == 1 else f'; for --mix.group {group} {advice}'}"
        )
    if (batch_size // parts) % group:
        raise ValueError(
            f"--batch_size {batch_size} gives each process microbatches of {batch_size // parts}, which is not a "
            f"multiple of --mix.group {group}: {advice}{'' if '--mix.group' in advice else ', or another --mix.group'}"
        )


def _fitting(most: int | None, parts: int, group: int) -> str:
    """Which batch sizes would do for steps of `parts` microbatches, and of `most` rows at most."""
    unit = parts * group
    if most is not None and most < parts:
        return (
            f"use fewer processes or a smaller --accumulation: a step has {parts} microbatches, the data {most} images"
        )
    if most is not None and most < unit:
        fitting = f"--batch_size {most // parts * parts} with --mix.group {most // parts}"
        return f"use a multiple of {unit} with more images, or {fitting}"
    ways = [f"a multiple of {unit}"] if unit > 1 else []
    return f"use {', '.join([*ways, *([] if most is None else [f'at most {most // unit * unit}'])])}"
