"""What plans a batch and makes its pixels: a gather over images in memory, or a DALI graph."""

import ctypes
import gc
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Hashable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal, NamedTuple, Protocol
from weakref import WeakValueDictionary

import numpy as np
import torch
from torch import Tensor

from dalikd.pipelines.content import LONGEST, goes_apart, image_sides, lacks_app14, lacks_end, refusal
from dalikd.pipelines.draw_spec import AUGMENTED_VIEWS_IN_DALI, BatchPlan, DrawSpec, ViewRun
from dalikd.pipelines.draws import place_windows
from dalikd.pipelines.hardware import PLAIN, Decoding, is_decode_failure
from dalikd.pipelines.resident import Resident, ResidentViews
from dalikd.pipelines.sampler import Sampler
from dalikd.pipelines.sources import Source
from dalikd.pipelines.windows import WindowViews

__all__ = [
    "Backend",
    "Context",
    "DaliBackend",
    "DaliOptions",
    "DeviceTransfer",
    "GatherBackend",
    "ObjectBackend",
    "Output",
    "ShardBackend",
    "UnfitError",
    "can_gather",
    "pack",
    "unpack",
]

_READ_AHEAD = 5  # batches that are asked for beyond those that are made ahead: by DALI, and one planned
_PNG, _JPEG = 0x50, 0xD8  # second bytes
_END = (0xFF, 0xD9)  # of a JPEG
_NO_FILE, _NO_IMAGE = np.frombuffer(b"/dev/null", np.uint8), np.zeros(2, np.uint8)
_ROWS_IN_FLIGHT = 4  # objects asked for ahead, for each request that there may be at once
_BYTES_AHEAD = 512 << 20  # of objects that are asked for ahead, beside the next batch
_LOOKED_UP = 16  # objects that one call looks for in the cache
_ALIGNMENT = 16  # bytes; no array of the packed buffer starts inside another's word
Layout = dict[Any, tuple[int, tuple[int, ...], torch.dtype]]  # name -> first byte, shape, type


class UnfitError(RuntimeError):
    """DALI has decoded an image of a kind that it gets wrong, or bytes that are not those of the image; `doctor` says
    which and why."""


class Output(NamedTuple):
    """What a backend has made: `images`, and `augmented` for each augmented view, uint8 [B, S, S, 3] each."""

    plan: BatchPlan
    images: Tensor
    augmented: tuple[Tensor, ...]


@dataclass(frozen=True)
class DaliOptions:
    """How DALI works.

    Attributes:
        threads: CPU threads.
        prefetch: batches made ahead.
        decoding: how a GPU decodes.
    """

    threads: int
    prefetch: int = 2
    decoding: Decoding = PLAIN


class DeviceTransfer:
    """Brings arrays and pixels to the device, without waiting for it.

    On a GPU the arrays of a batch travel as one: packed into a pinned buffer and sent by one asynchronous copy. On the
    CPU nothing is copied unless there are buffers.

    Args:
        device: where tensors go.
        buffers: 0: every tensor owns its memory. n: n sets of fixed buffers are used in turn, so that nothing is
            allocated in a step; a batch then holds until n - 1 further batches have been taken.

    Attributes:
        turn: number of the batch; count it up where a new one begins.
    """

    def __init__(self, device: torch.device, buffers: int = 0) -> None:
        self._device = device
        self._slots: list[dict[str, Tensor]] = [{} for _ in range(buffers)]
        self.turn = 0

    def arrays(self, arrays: Mapping[Hashable, np.ndarray], place: str = "arrays") -> dict[Any, Tensor]:
        """Send arrays together.

        Args:
            arrays: by any keys, of any types and shapes.
            place: name of the buffer; each is used once a batch.
        """
        if not arrays:
            return {}
        if self._device.type == "cpu" and not self._slots:
            return {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in arrays.items()}
        packed, layout = pack(arrays, pin=self._device.type == "cuda")
        buffer = self._buffer(place, packed.shape, packed.dtype)
        # the pinned buffer goes back to torch's pool, which keeps it until the copy is done
        return unpack(buffer.copy_(packed, non_blocking=True), layout)

    def pixels(self, name: str, output: Any) -> Tensor:
        """Take pixels, uint8 [B, ...], out of DALI's buffer, which goes back to its pool in stream order.

        On a GPU by DALI's own copy: what it gives by DLPack it frees in a thread that waits for the whole device.
        """
        if self._device.type == "cuda":
            buffer = self._buffer(name, torch.Size(output.shape()), torch.uint8)
            stream = ctypes.c_void_p(torch.cuda.current_stream(self._device).cuda_stream)
            output.copy_to_external(ctypes.c_void_p(buffer.data_ptr()), stream, non_blocking=True)
            return buffer
        tensor = torch.from_dlpack(output)
        return self._buffer(name, tensor.shape, tensor.dtype).copy_(tensor) if self._slots else tensor

    def _buffer(self, name: str, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        """Memory for a tensor: new, or the first rows of a fixed buffer."""
        if not self._slots:
            return torch.empty(shape, dtype=dtype, device=self._device)
        slot = self._slots[self.turn % len(self._slots)]
        fixed = slot.get(name)
        if fixed is None or len(fixed) < shape[0] or fixed.shape[1:] != shape[1:]:
            fixed = slot[name] = torch.empty(shape, dtype=dtype, device=self._device)
        return fixed[: shape[0]]


class Decoder(Protocol):
    """What is used here of a `doctor.Decoder`: it decodes images one by one, JPEG 2000 and TIFF in another process."""

    at_once: int

    def decode(self, encoded: Sequence[bytes]) -> list[np.ndarray | str]: ...

    def close(self) -> None: ...


@dataclass(frozen=True)
class Context:
    """What a backend works with.

    Attributes:
        source: the images.
        sampler: their order, and this process's share of it.
        spec: views and draws.
        device: where pixels are wanted.
        transfer: brings tensors to the device.
        decoder: `doctor.Decoder`, for images that DALI alone cannot be trusted with.
        replaced: row that cannot be decoded -> row used in its place; the loader adds to it.
    """

    source: Source
    sampler: Sampler
    spec: DrawSpec
    device: torch.device
    transfer: DeviceTransfer
    decoder: Callable[..., Decoder]
    replaced: dict[int, int] = field(default_factory=dict)


class Backend(ABC):
    """Plans microbatches and makes their pixels, one after the other."""

    def __init__(self, context: Context) -> None:
        self._context = context

    def plan(self, position: int, rows: np.ndarray | None = None) -> BatchPlan:
        """What microbatch number `position` holds: a pure function of it, and of the rows where a reader decides which
        they are."""
        context = self._context
        sampler = context.sampler
        micro = sampler[position] if rows is None else replace(sampler.place(position), rows=rows)
        used = self._rows(micro.rows) if context.replaced else micro.rows
        return BatchPlan(micro, used, context.spec.draw(micro))

    def _rows(self, rows: np.ndarray) -> np.ndarray:
        """Those that are used in the place of a microbatch's."""
        return np.array([self._context.replaced.get(int(row), int(row)) for row in rows])

    @abstractmethod
    def feed(self, position: int) -> tuple[BatchPlan, tuple[Any, ...]]:
        """All that Python does for microbatch number `position`: its plan, and the inputs of its views."""

    @abstractmethod
    def fetch(self, position: int) -> Output:
        """The pixels of microbatch number `position`: the one after the last, or any after `close`."""

    def restart(self) -> None:
        """Drop what was made ahead, after a failure; `fetch` goes on where it was."""
        self.close()

    def close(self) -> None:  # noqa: B027 - where nothing runs ahead, nothing is to be done
        """Free threads and memory; the next `fetch` starts anew."""


def can_gather(source: Source, spec: DrawSpec, resident: Resident | None = None) -> bool:
    """Whether nothing has to be resized or warped, so that a gather makes the views of images in memory.

    One view that only DALI can make sends all of them through DALI, which decodes or slices once for all.
    """
    view = spec.view
    if resident is None and (source.arrays is None or source.arrays.shape[1:3] != (view.size, view.size)):
        return False
    resizes = view.crop == "random_resized_crop" or (view.crop == "center_crop" and view.resize != view.size)
    return not resizes and not any(run.kind in AUGMENTED_VIEWS_IN_DALI for run in spec.views)


class GatherBackend(Backend):
    """Images in the device's memory, gathered by torch."""

    def __init__(self, context: Context, resident: Resident) -> None:
        super().__init__(context)
        view, side = context.spec.view, resident.pixels.shape[1:]
        assert side == (view.size, view.size), side
        self._views = ResidentViews(resident, view.padding, view.border, len(context.spec.views))

    def fetch(self, position: int) -> Output:
        """The pixels of a microbatch."""
        plan, (rows, draws) = self.feed(position)
        return Output(plan, *self._views(rows, draws))

    def feed(self, position: int) -> tuple[BatchPlan, tuple[Any, ...]]:
        """The plan of a microbatch, and its rows and draws as tensors on the device."""
        plan = self.plan(position)
        sent = self._context.transfer.arrays({"rows": plan.rows, **plan.draws.views}, "views")
        return plan, (sent.pop("rows"), sent)


class DaliBackend(Backend):
    """A DALI pipeline fed by the sampler, built when first needed."""

    def __init__(self, context: Context, options: DaliOptions) -> None:
        from dalikd.pipelines.graphs import build_graph, input_names

        super().__init__(context)
        source, self._options = context.source, options
        self._reader: Literal["files", "bytes", "arrays"] = "files" if source.arrays is None else "arrays"
        self._view = context.spec.view
        self._views: tuple[ViewRun, ...] = context.spec.views
        self._windows: WindowViews | None = None
        if self._view.crop == "random_resized_crop" and context.device.type == "cpu":
            self._windows = WindowViews(context.spec, context.sampler.microbatch, options.threads, build_graph)
            self._view, self._views = replace(self._view, crop="window"), ()
        self._names = input_names(self._view, self._views)[1:]
        self._sides: np.ndarray | None = None  # height and width of each row, 0 where not known: int32 [N, 2]
        if self._view.crop in ("window", "random_resized_crop"):
            self._sides = np.zeros((len(source), 2), np.int32) if source.files is None else source.files.sides()
            if source.arrays is not None:
                self._sides[:] = source.arrays.shape[1:3]
        self._graph: Any = None
        self._first = 0
        self._plans: deque[BatchPlan] = deque()
        # makes the next batch's inputs meanwhile: the thread that runs a step also launches its kernels
        self._planner = ThreadPoolExecutor(1, thread_name_prefix="dalikd-plan")
        self._ahead: Future[tuple[BatchPlan, tuple[Any, ...]]] | None = None
        self._fit: set[int] = set()  # rows of rare formats that have been looked at
        self._mend_cmyk = False
        self._judge: Decoder | None = None  # once a JPEG 2000 or TIFF image has come
        self._judged = np.zeros(len(source), bool)  # rows that it knows

    def fetch(self, position: int) -> Output:
        """The pixels of a microbatch; the pipeline is built at the first one.

        Raises:
            RuntimeError: DALI fails.
            UnfitError: DALI does not, but has made wrong pixels.
        """
        if self._graph is None:
            self._graph = self._build(position)
        device = self._context.device
        # without a stream run() would wait for the device
        stream = (torch.cuda.current_stream(device),) if device.type == "cuda" else ()
        try:
            outputs = self._graph.run(*stream)
        except RuntimeError as error:
            if self._judge is not None or not is_decode_failure(error) or not self._goes_apart(position):
                raise
            outputs = None
        if outputs is None:
            self._judge = self._context.decoder(self._options.threads, device, self._options.decoding)
            self.restart()
            return self.fetch(position)
        if self._reader != "arrays":
            views = 1 + len(self._views)
            outputs, signs = outputs[:views], outputs[views:]
            if self._look(self._plans[0], *(np.asarray(sign.as_tensor()) for sign in signs)):
                self.restart()
                return self.fetch(position)
        if self._windows is not None:
            plan, (windows,) = self._plans.popleft(), outputs
            return Output(plan, *self._windows(windows, plan.draws.views))
        transfer = self._context.transfer
        images, *augmented = (transfer.pixels(f"view{number}", made.as_tensor()) for number, made in enumerate(outputs))
        return Output(self._plans.popleft(), images, tuple(augmented))

    def close(self) -> None:
        """Free the pipeline; what is planned in the thread is waited for, and dropped."""
        if self._ahead is not None:
            wait([self._ahead])
            self._ahead = None
        if self._judge is not None:
            self._judge.close()
        if self._graph is None:
            return
        self._graph = None
        self._plans.clear()
        if self._windows is not None:
            self._windows.close()
        gc.collect()
        with_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # DALI's freed buffers stay in glibc's arenas
        if with_trim is not None:
            with_trim(0)

    def feed(self, position: int) -> tuple[BatchPlan, tuple[Any, ...]]:
        """The plan of a microbatch, and the graph's inputs."""
        plan, source = self.plan(position), self._context.source
        trusted = () if self._judge is None else (self._trusted(plan, self._judge),)
        draws = plan.draws.views
        if self._reader == "files":  # paths as one array, zeros after the shorter ones: an array each takes DALI long
            files = source.files
            assert files is not None
            starts, lengths = files.offsets[plan.rows], files.offsets[plan.rows + 1] - files.offsets[plan.rows]
            places = np.arange(lengths.max())
            letters = files.buffer[np.minimum(starts[:, None] + places, len(files.buffer) - 1)]
            images = np.where(places < lengths[:, None], letters, np.uint8(0))
        else:
            images = source.arrays[plan.rows] if source.arrays is not None else self._contents(plan)
        if self._sides is not None:
            sides = np.maximum(self._sides[plan.rows], 1)
            too_large = sides.prod(1, dtype=np.int64) > source.max_pixels
            if too_large.any():  # DALI fails on nothing, and allocates nothing for it
                images = _without(images, too_large)
            start, shape = place_windows(draws["tries"], draws["offsets"], sides, self._view.ratio)
            draws = {**draws, "start": start, "shape": shape}
        return plan, (images, *(np.ascontiguousarray(draws[name]) for name in self._names), *trusted)

    def _goes_apart(self, position: int) -> bool:
        """Whether JPEG 2000 or TIFF is in a microbatch: a graph that is not told which are well fails on all."""
        plan = self.plan(position)
        return any(goes_apart(self._content_or_nothing(plan, slot)) is not None for slot in range(len(plan.rows)))

    def _trusted(self, plan: BatchPlan, judge: Decoder) -> np.ndarray:
        """Which JPEG 2000 and TIFF images DALI may decode: those that another process has decoded, each once.

        Returns:
            uint8 [B], 1 for these. Other formats need none.
        """
        new = np.flatnonzero(~self._judged[plan.rows])
        with ThreadPoolExecutor(self._options.threads) as pool:
            for first in range(0, len(new), judge.at_once):
                slots = new[first : first + judge.at_once]
                read = pool.map(partial(self._content_or_nothing, plan), slots)
                contents = zip(plan.rows[slots].tolist(), read, strict=True)
                found = {row: content for row, content in contents if goes_apart(content) is not None}
                answers = zip(found, judge.decode(list(found.values())), strict=True)
                self._fit |= {row for row, answer in answers if not isinstance(answer, str)}
        self._judged[plan.rows] = True
        if self._judged.all():
            judge.close()
        return np.array([row in self._fit for row in plan.rows.tolist()], np.uint8)

    def _content_or_nothing(self, plan: BatchPlan, slot: int) -> bytes:
        """The encoded image in a slot; where it cannot be read DALI fails too."""
        try:
            return self._content(plan, slot)
        except OSError:
            return b""

    def _contents(self, plan: BatchPlan) -> list[np.ndarray]:
        """The encoded images of a batch that lie neither in files nor in memory: for backends that read them."""
        raise NotImplementedError

    def _look(self, plan: BatchPlan, second: np.ndarray, shape: np.ndarray, ends: np.ndarray | None = None) -> bool:
        """Compare the sides that windows were placed by. Look at images, once each, that are neither PNG nor JPEG of
        one or three channels; on a GPU also at JPEGs that other bytes than the marker of their end conclude: where
        pixels are missing, nvJPEG may put grey ones without a word, which the CPU's decoder refuses.

        Args:
            plan: of a batch that DALI has decoded.
            second: second byte of each image, uint8 [B].
            shape: height, width and channels of each image, [B, 3].
            ends: on a GPU, last two bytes of each image, [B, 2].

        Returns:
            whether the batch must be made again, with the right sides or CMYK mended.

        Raises:
            UnfitError: an image is of a kind that DALI gets wrong, or larger than was known.
        """
        if self._has_wrong_sides(plan, shape):
            return True
        rare = (second != _JPEG) | (shape[:, 2] == 4)
        if ends is not None:
            rare |= (ends != _END).any(1)
        rare, context = np.flatnonzero((second != _PNG) & rare), self._context
        for slot in rare.tolist():
            row = int(plan.rows[slot])
            if row in self._fit:
                continue
            try:
                encoded = self._content(plan, slot)
            except OSError as error:  # it has just been there
                raise UnfitError from error
            if refusal(encoded, context.source.max_pixels) is not None:
                raise UnfitError
            cut_off = ends is not None and lacks_end(encoded)
            if cut_off and isinstance(context.decoder(1).decode([encoded])[0], str):
                raise UnfitError
            if not self._mend_cmyk and second[slot] == _JPEG and shape[slot, 2] == 4 and lacks_app14(encoded):
                self._mend_cmyk = True
                return True
            self._fit.add(row)
        return False

    def _has_wrong_sides(self, plan: BatchPlan, shape: np.ndarray) -> bool:
        """Whether windows were placed by other sides than a batch has; these are known from now on."""
        if self._sides is None:
            return False
        if (shape[:, 0] * shape[:, 1] > self._context.source.max_pixels).any():
            raise UnfitError
        wrong = (self._sides[plan.rows] != shape[:, :2]).any(1)
        self._sides[plan.rows[wrong]] = shape[wrong, :2]
        return bool(wrong.any())

    def _content(self, plan: BatchPlan, slot: int) -> bytes:
        """The encoded image in a slot of a batch."""
        return self._context.source.read(int(plan.rows[slot]))

    def _build(self, position: int) -> Any:
        from dalikd.pipelines.graphs import build_graph

        context, self._first = self._context, position
        return build_graph(
            self._inputs,
            self._view,
            self._views,
            reader=self._reader,
            batch_size=context.sampler.microbatch,
            device_id=(context.device.index or 0) if context.device.type == "cuda" else None,
            threads=self._options.threads,
            prefetch=self._options.prefetch,
            decoding=self._options.decoding,
            mend_cmyk=self._mend_cmyk,
            apart=self._judge is not None,
            ends=context.device.type == "cuda" and self._reader != "arrays",
            max_pixels=context.source.max_pixels,
        )

    def _inputs(self, info: Any) -> tuple[Any, ...]:
        position = self._first + info.iteration
        plan, inputs = self.feed(position) if self._ahead is None else self._ahead.result()
        self._ahead = self._planner.submit(self.feed, position + 1)
        self._plans.append(plan)
        return inputs


class ShardBackend(DaliBackend):
    """A DALI pipeline fed by a reader of shards: the reader decides which rows come, and brings their bytes.

    Batches that were read stay until their pixels are out, so that after a failure nothing is read again.
    """

    def __init__(self, context: Context, options: DaliOptions) -> None:
        from dalikd.pipelines.shards.stream import Encoded, MicrobatchReader

        assert context.source.shards is not None
        super().__init__(context, options)
        self._reader = "bytes"
        self._shards = context.source.shards
        self._microbatches = MicrobatchReader(self._shards, context.sampler)
        self._read: dict[int, Encoded] = {}
        self._most = options.prefetch + _READ_AHEAD

    def fetch(self, position: int) -> Output:
        """The pixels of a microbatch.

        Raises:
            UnfitError: DALI has made them of bytes that are not those that were written.
        """
        output = super().fetch(position)
        read = self._read.get(position)  # None where the batch was made again, and has been looked at
        if read is not None:
            damaged = read.ids[read.damaged & (read.ids == output.plan.rows)]
            if len(damaged):
                raise UnfitError(f"image {damaged[0]} of {self._shards.folder} came with other bytes than were written")
            del self._read[position]
        return output

    def plan(self, position: int, rows: np.ndarray | None = None) -> BatchPlan:
        """What a microbatch holds; it is read for that, if its rows are not given."""
        if rows is not None:
            return super().plan(position, rows)
        if position not in self._read:
            self._read[position] = self._microbatches.take(position)
        if len(self._read) > self._most:
            del self._read[min(self._read)]
        return super().plan(position, self._read[position].ids)

    def restart(self) -> None:
        """Free the pipeline, but not what was read for it."""
        super().close()

    def close(self) -> None:
        """Free the pipeline and the reader."""
        super().close()
        self._read.clear()
        self._microbatches.close()

    def _content(self, plan: BatchPlan, slot: int) -> bytes:
        read, row = self._read[plan.micro.index], int(plan.rows[slot])
        return read.contents[slot].tobytes() if row == read.ids[slot] else self._shards.read(row)

    def _contents(self, plan: BatchPlan) -> list[np.ndarray]:
        read = self._read[plan.micro.index]
        contents = read.contents
        if not np.array_equal(plan.rows, read.ids):
            images = zip(plan.rows.tolist(), read.ids.tolist(), read.contents, strict=True)
            contents = [
                content if row == own else np.frombuffer(self._shards.read(row), np.uint8)
                for row, own, content in images
            ]
        if self._sides is not None:
            for slot in np.flatnonzero(self._sides[plan.rows, 0] == 0).tolist():  # each row once
                self._sides[plan.rows[slot]] = np.minimum(image_sides(partial(_part, contents[slot])), LONGEST)
        return contents


class ObjectBackend(DaliBackend):
    """A DALI pipeline fed with objects from a store. The sampler knows which come next: they are asked for ahead,
    bounded in number and bytes, and kept until their pixels are out."""

    def __init__(self, context: Context, options: DaliOptions) -> None:
        super().__init__(context, options)
        files = context.source.files
        assert files is not None
        assert files.store is not None
        assert files.sizes is not None
        self._reader = "bytes"
        self._files, self._store, self._sizes = files, files.store, files.sizes
        self._asked: dict[int, dict[int, Future[Any]]] = {}  # by microbatch, by row: of the bytes
        self._rows_of: dict[int, np.ndarray] = {}  # by microbatch: a sampler that went back would make orders anew
        self._known: WeakValueDictionary[int, Future[Any]] = WeakValueDictionary()  # by row, while it is asked for

    def fetch(self, position: int) -> Output:
        """The pixels of a microbatch.

        Raises:
            StoreError: the store does not answer, or refuses.
        """
        output = super().fetch(position)
        for index in [index for index in self._asked if index <= position]:
            del self._asked[index]
            self._rows_of.pop(index, None)
        return output

    def plan(self, position: int, rows: np.ndarray | None = None) -> BatchPlan:
        """What a microbatch holds."""
        return super().plan(position, self._rows_of.get(position) if rows is None else rows)

    def restart(self) -> None:
        """Free the pipeline, but not what was fetched for it."""
        super().close()

    def close(self) -> None:
        """Free the pipeline, and take back what was asked for."""
        super().close()
        for futures in self._asked.values():
            for future in futures.values():
                future.cancel()
        self._asked.clear()
        self._rows_of.clear()

    def _ask(self, index: int, rows: np.ndarray) -> None:
        """Ask for those objects of a microbatch that nobody has asked for yet."""
        futures = self._asked.setdefault(index, {})
        wanted = [row for row in dict.fromkeys(rows.tolist()) if row not in futures]
        futures |= {row: self._known[row] for row in wanted if row in self._known}
        new = [row for row in wanted if row not in futures]
        if self._store.cache is None:
            objects = zip(new, self._files.objects(new), strict=True)
            futures |= {row: self._store.submit(self._store.download, *one) for row, one in objects}
        else:
            for first in range(0, len(new), _LOOKED_UP):
                part = new[first : first + _LOOKED_UP]
                futures |= dict.fromkeys(part, self._store.submit(self._look_up, part))
        self._known.update((row, futures[row]) for row in new)

    def _look_up(self, rows: list[int]) -> dict[int, bytes | Future[bytes]]:
        """What the cache has of some objects, and the promise of the others."""
        objects = zip(rows, self._files.objects(rows), strict=True)
        kept = [(row, self._store.kept(*one), one) for row, one in objects]
        return {
            row: self._store.submit(self._store.download, *one) if held is None else held for row, held, one in kept
        }

    def _ask_ahead(self, index: int) -> None:
        """Ask for the microbatches after one, as far as there is room; without their draws, which nobody needs yet."""
        rows, held, sampler = 0, 0, self._context.sampler
        most = min(_ROWS_IN_FLIGHT * self._store.in_flight, sampler.size)
        while rows < most and held < _BYTES_AHEAD:
            index += 1
            if index not in self._rows_of:
                self._rows_of[index] = sampler[index].rows
            wanted = self._rows(self._rows_of[index])
            if index not in self._asked:
                self._ask(index, wanted)
            rows, held = rows + len(wanted), held + int(self._sizes[wanted].sum())

    def _content(self, plan: BatchPlan, slot: int) -> bytes:
        """Raises OSError: it is missing, or has changed."""
        row = int(plan.rows[slot])
        self._ask(plan.micro.index, np.array([row]))
        answer = self._asked[plan.micro.index][row].result()
        answer = answer[row] if isinstance(answer, dict) else answer
        return answer.result() if isinstance(answer, Future) else answer

    def _contents(self, plan: BatchPlan) -> list[np.ndarray]:
        """What is missing, or has changed, is no image: DALI fails on it, and the loader then finds it."""
        self._ask(plan.micro.index, plan.rows)
        self._ask_ahead(plan.micro.index)
        contents = []
        for slot, row in enumerate(plan.rows.tolist()):
            try:
                contents.append(np.frombuffer(self._content(plan, slot), np.uint8))
            except ConnectionError:
                raise
            except OSError:
                contents.append(_NO_IMAGE)
            if self._sides is not None and self._sides[row, 0] == 0:  # each row once
                self._sides[row] = np.minimum(image_sides(partial(_part, contents[slot])), LONGEST)
        return contents


def _without(images: Any, hidden: np.ndarray) -> Any:
    """Encoded images, or paths in one array that end in zeros, without some: nothing in their places."""
    if not isinstance(images, np.ndarray):
        return [_NO_IMAGE if hide else image for hide, image in zip(hidden, images, strict=True)]
    images = np.pad(images, ((0, 0), (0, len(_NO_FILE))))
    images[hidden] = 0
    images[hidden, : len(_NO_FILE)] = _NO_FILE
    return images


def _part(content: np.ndarray, offset: int, count: int) -> bytes:
    return content[offset : offset + count].tobytes()


# ------------------------------------------------------------------------- arrays that travel as one


def pack(arrays: Mapping[Hashable, np.ndarray], pin: bool = False) -> tuple[Tensor, Layout]:
    """Put arrays one after the other into one buffer.

    Returns:
        uint8 [bytes], in pinned memory where asked for, and where each array lies in it.
    """
    layout, size = {}, 0
    sources: dict[Hashable, Any] = {}
    for name, array in arrays.items():
        source = torch.from_numpy(np.ascontiguousarray(array))
        layout[name], sources[name] = (size, tuple(source.shape), source.dtype), source
        size += -(-source.nbytes // _ALIGNMENT) * _ALIGNMENT
    packed = torch.empty(size, dtype=torch.uint8, pin_memory=pin)
    for name, target in unpack(packed, layout).items():
        target.copy_(sources[name])
    return packed, layout


def unpack(packed: Tensor, layout: Layout) -> dict[Any, Tensor]:
    """The arrays of a packed buffer, as views."""
    views = {}
    for name, (start, shape, dtype) in layout.items():
        count = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        views[name] = packed[start : start + count].view(dtype).reshape(shape)
    return views
