"""The DALI graphs: read → guarded decode → view → augmented views of it, each a branch → uint8 NHWC pixels.

No DALI random operator stands here: every draw comes in as an input, so that a sample's pixels depend on its row, the
epoch and the seed alone. `mixed` decode on a GPU, `cpu` otherwise; the rest of a graph follows the pixels.
"""

# DALI's type stubs lack its constants and take every result for a possible list of nodes.
# pyright: reportAttributeAccessIssue=false, reportArgumentType=false, reportCallIssue=false
# pyright: reportOperatorIssue=false, reportOptionalMemberAccess=false, reportGeneralTypeIssues=false

import contextlib
import io
import os
import tempfile
import warnings
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
from nvidia.dali import fn, math, types
from nvidia.dali.pipeline import Pipeline, do_not_convert, pipeline_def

from dalikd.pipelines.content import MAX_PIXELS
from dalikd.pipelines.draw_spec import View, ViewRun
from dalikd.pipelines.hardware import PLAIN, Decoding

__all__ = ["build_graph", "input_names"]

os.environ.setdefault("OPENCV_LOG_LEVEL", "ERROR")  # it warns of each JPEG 2000 image that names no color space

Reader = Literal["files", "bytes", "arrays"]
_FILTERS = {"bilinear": types.INTERP_TRIANGULAR, "bicubic": types.INTERP_CUBIC}
_POLICY_DRAWS = ("operation", "magnitude", "sign")
_AUGMENTED_DRAWS = {
    "flip": ("augmented_flip",),
    "crop_flip": ("augmented_crop", "augmented_flip"),
    "autoaugment": _POLICY_DRAWS,
    "randaugment": _POLICY_DRAWS,
    "trivialaugment": _POLICY_DRAWS,
}


def input_names(view: View, views: Sequence[ViewRun] = (), *, apart: bool = False) -> tuple[str, ...]:
    """The graph's inputs in order: `source` (paths, encoded images or arrays); the draws by name, of windows their
    `start` and `shape` (`draws.place_windows`); `trusted` where JPEG 2000 or TIFF images may come: uint8, 1 for those
    that another process has decoded."""
    base = {
        "center_crop": (),
        "square": (),
        "whole": (),
        "window": ("start", "shape"),
        "pad_crop": ("crop", "flip"),
        "random_resized_crop": ("start", "shape", "flip"),
    }
    more = (f"{name}{index}" for index, run in enumerate(views) for name in _AUGMENTED_DRAWS[run.kind])
    return ("source", *base[view.crop], *more, *(("trusted",) if apart else ()))


def build_graph(
    callback: Callable[[Any], Sequence[Any]],
    view: View,
    views: Sequence[ViewRun] = (),
    *,
    reader: Reader,
    batch_size: int,
    threads: int,
    device_id: int | None,
    prefetch: int = 2,
    decoding: Decoding = PLAIN,
    mend_cmyk: bool = False,
    apart: bool = False,
    ends: bool = False,
    max_pixels: int = MAX_PIXELS,
) -> Pipeline:
    """Build and warm a pipeline whose inputs come from `callback(BatchInfo)`.

    Args:
        callback: returns one batch for each of `input_names(view, views, apart=apart)`, for ever.
        view: the base view.
        views: the augmented views.
        reader: the source is "files": paths as uint8 arrays, zeros at their ends or none; "bytes": encoded images as
            uint8 arrays; "arrays": uint8 [H, W, 3] pixels.
        batch_size: the largest batch.
        threads: DALI's CPU threads.
        device_id: the CUDA device, or None for a graph that runs on the CPU.
        prefetch: batches made ahead.
        decoding: how a GPU decodes.
        mend_cmyk: take a JPEG of four channels without an APP14 segment for inverted CMYK, as Pillow does; DALI takes
            it for CMYK that is not, which makes most of them black.
        apart: decode the JPEG 2000 and TIFF images that are `trusted`. A graph without this fails on all of them.
        ends: give out the last two bytes of the encoded images.
        max_pixels: the graph fails on an encoded image of more, and allocates nothing for it; but for views whose
            windows are placed before, by sides that are known then.

    Returns:
        a built pipeline with an output for the base view and one for each augmented view: uint8 [H, W, 3] pixels for
        each sample; where these were encoded, also their second byte (uint8) and their height, width and channels
        (float32 [3]); and their last two bytes (uint8 [2]) where asked for. A window that reaches beyond its image is
        cut off there: compare the sides.

    Raises:
        OSError: the folder for temporary files is full: DALI writes a graph's code there.
    """
    with _quiet_build():
        graph = _graph(
            callback,
            view,
            tuple(views),
            reader,
            decoding,
            mend_cmyk,
            apart,
            ends,
            max_pixels,
            batch_size=batch_size,
            num_threads=threads,
            device_id=device_id,
            prefetch_queue_depth=prefetch,
        )
        graph.build()
    return graph


@contextlib.contextmanager
def _quiet_build():
    """DALI's own modules print deprecation warnings of each other while a graph is built, past every filter."""
    original = warnings.showwarning
    warnings.showwarning = lambda *args, **kwargs: (
        None if "nvidia/dali" in str(args[2]) or "DALI" in str(args[0]) else original(*args, **kwargs)
    )
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    except TypeError as error:
        if "conditional context" not in str(error):
            raise
        raise OSError(f"{tempfile.gettempdir()} is full, and DALI writes code there: free it, or set TMPDIR") from error
    finally:
        warnings.showwarning = original


@pipeline_def(enable_conditionals=True)
def _graph(
    callback,
    view: View,
    views: tuple[ViewRun, ...],
    reader: Reader,
    decoding: Decoding,
    mend_cmyk: bool,
    apart: bool,
    ends: bool,
    max_pixels: int,
):
    draws = _inputs(callback, input_names(view, views, apart=apart))
    trusted = draws["trusted"] if apart else None
    bound = max_pixels if "start" not in draws else None
    source = _READERS[reader](draws["source"], decoding, mend_cmyk, trusted, bound)
    outputs = [_VIEWS[view.crop](source, view, draws)]
    for index, run in enumerate(views):
        outputs.append(_AUGMENTED[run.kind](outputs[0], view, run, _draws_of(draws, index, run)))
    return (*outputs, *source.signs, *((source.bytes[-2:],) if ends else ()))


@do_not_convert
def _draws_of(draws: dict[str, Any], index: int, run: ViewRun) -> dict[str, Any]:
    """The draws of augmented view number `index`, by their names without the number."""
    return {name: draws[f"{name}{index}"] for name in _AUGMENTED_DRAWS[run.kind]}


@do_not_convert  # plain Python, not DALI's conditional dialect
def _inputs(callback, names: tuple[str, ...]) -> dict[str, Any]:
    nodes = fn.external_source(source=callback, num_outputs=len(names), batch=True, batch_info=True)
    return dict(zip(names, nodes, strict=True))


# ----------------------------------------------------------------------------------------------- readers


_ADOBE = np.frombuffer(b"\xff\xee\0\x0eAdobe\0\x64\0\0\0\0\0", np.uint8)  # an APP14 segment: CMYK, inverted


def _encoded(encoded, decoding: Decoding, mend_cmyk: bool, trusted, max_pixels: int | None) -> "_Encoded":
    """Decoding always depends on the peeked shape: a header that cannot be parsed then raises, where the bare decoder
    of DALI may crash the process. Damaged JPEG 2000 and TIFF does crash it: of these only what is `trusted` is seen. Of
    what is too large the decoder sees nothing either, and fails."""
    second = encoded[1]
    sign = (encoded[0] ^ second) % 0xB0  # 0 in TIFF (II or MM) and JPEG 2000 (0 0 or FF 4F), in no other format
    hidden = sign == 0 if trusted is None else (sign + trusted) == 0
    if hidden:
        encoded = _nothing(encoded)
    shape = fn.peek_image_shape(encoded, adjust_orientation=False, image_type=types.ANY_DATA, dtype=types.FLOAT)
    if mend_cmyk:
        encoded = _with_app14(encoded, (shape[2] == 4) & (second == 0xD8))
    if max_pixels is not None:
        if shape[0] * shape[1] > max_pixels * (1 + 1e-6):  # in float32, whose steps are below 1e-7
            encoded = _nothing(encoded)
    elif decoding.whole and shape[0] == 0:  # there is no window, which would depend on the shape
        encoded = _nothing(encoded)
    return _Encoded(encoded, second, shape, decoding)


def _nothing(encoded):
    return fn.slice(encoded, start=[0], shape=[0], axes=[0])


def _with_app14(encoded, wanted):
    """Put an APP14 segment at the front. Where another one follows, that has the last word."""
    if wanted:
        start = fn.slice(encoded, start=[0], shape=[2], axes=[0])
        rest = fn.slice(encoded, start=[2], end=fn.shapes(encoded, dtype=types.INT32), axes=[0])
        encoded = fn.cat(start, types.Constant(_ADOBE), rest)
    return encoded


class _Encoded:
    """Encoded images with their second byte and their shape: height, width, channels."""

    def __init__(self, encoded, second, shape, decoding: Decoding) -> None:
        self.bytes, self.decoding, self.shape = encoded, decoding, shape
        self.signs = (second, shape)

    def window(self, start, shape):
        """Decode rows and columns of `start` and `shape`, (y, x) in pixels, float32."""
        options = {
            "output_type": types.RGB,
            "adjust_orientation": False,
            # the fused hardware path interpolates chroma otherwise than libjpeg-turbo does
            "jpeg_fancy_upsampling": True,
            "device": "cpu",
        }
        if _on_gpu():
            options |= {"device": "mixed", "hw_decoder_load": float(self.decoding.hw_decoder_load)}
        if self.decoding.whole:
            return _cut(fn.decoders.image(self.bytes, **options), start, shape)
        return fn.decoders.image_slice(
            self.bytes,
            start,
            shape,
            axis_names="HW",
            normalized_anchor=False,
            normalized_shape=False,
            **options,
        )


def _files(paths, decoding: Decoding, mend_cmyk: bool, trusted, max_pixels: int | None) -> _Encoded:
    return _encoded(fn.io.file.read(paths, dont_use_mmap=True), decoding, mend_cmyk, trusted, max_pixels)


def _on_gpu() -> bool:
    return Pipeline.current().device_id not in (None, types.CPU_ONLY_DEVICE_ID)


def _cut(pixels, start, shape):
    return fn.slice(pixels, fn.cast(start, dtype=types.INT32), fn.cast(shape, dtype=types.INT32), axes=[0, 1])


class _Pixels:
    """Arrays that were decoded before."""

    signs = ()

    def __init__(self, pixels, decoding, mend_cmyk, trusted, max_pixels) -> None:  # noqa: ARG002 - readers have one form
        self.shape = fn.shapes(pixels, dtype=types.FLOAT)
        named = fn.reshape(pixels, layout="HWC")
        self.pixels = named.gpu() if _on_gpu() else named

    def window(self, start, shape):
        return _cut(self.pixels, start, shape)


_READERS = {"files": _files, "bytes": _encoded, "arrays": _Pixels}


# ------------------------------------------------------------------------------------------------- views


def _random_resized_crop(source, view: View, draws):
    pixels = fn.resize(_window(source, view, draws), size=[view.size, view.size], **_filter(view))
    return fn.flip(pixels, horizontal=draws["flip"])


def _window(source, view: View, draws):  # noqa: ARG001 - all views have one form
    # the sides that a window was placed by may be out of date; and decoding must depend on the peeked shape
    sides = source.shape[:2]
    start = math.min(draws["start"], sides - 1.0)
    return source.window(start, math.min(draws["shape"], sides - start))


def _whole(source, view: View, draws):  # noqa: ARG001 - all views have one form
    return source.window(source.shape[:2] * 0.0, source.shape[:2])


def _center_crop(source, view: View, draws):  # noqa: ARG001 - all views have one form
    ring = 4 if view.interpolation == "bicubic" else 2  # pixels of both borders whose filter reaches over the border
    resize = _resize_renormalised if view.resize - view.size < ring else _resize
    return _resize_and_crop(source, view.resize, view, resize)


def _resize_and_crop(source, short_side: int, view: View, resize):
    """torchvision's Resize(short_side) and CenterCrop(size): the long side floored, offsets rounded half to even."""
    height, width = (fn.cast(source.shape[axis], dtype=types.INT32) for axis in (0, 1))
    short = math.min(height, width)
    new_height, new_width = (short_side * height) // short, (short_side * width) // short
    pixels = resize(_whole(source, view, {}), (height, width), (new_height, new_width), view)
    start = fn.stack(_half_to_even(new_height - view.size), _half_to_even(new_width - view.size))
    return fn.slice(pixels, start=start, shape=[view.size, view.size], axes=[0, 1])


def _resize(pixels, sides, new_sides, view: View, **options):  # noqa: ARG001 - both resizes have one form
    height, width = (fn.cast(side, dtype=types.FLOAT) for side in new_sides)
    return fn.resize(pixels, resize_y=height, resize_x=width, **_filter(view), **options)


def _resize_renormalised(pixels, sides, new_sides, view: View):
    """Resize as Pillow does up to the border: there the filter's weights are those inside the image, scaled to 1.

    DALI repeats the edge instead, up to 27 grey levels away on photographs. So the image gets a fourth channel of
    ones and a margin of zeros; resized, the fourth channel is the sum of the weights inside.
    """
    margin = 2 * (sides[0] // new_sides[0]) + 4  # a bicubic filter reaches 1.5 old pixels a new one over the border
    with_ones = fn.slice(pixels, start=[0], shape=[4], axes=[2], out_of_bounds_policy="pad", fill_values=1)
    begin, end = fn.stack(margin, margin), fn.stack(sides[0] + margin, sides[1] + margin)
    padded = fn.slice(
        with_ones,
        start=-begin,
        shape=begin + end,
        axes=[0, 1],
        out_of_bounds_policy="pad",
        fill_values=0,
    )
    region = {"roi_start": fn.cast(begin, dtype=types.FLOAT), "roi_end": fn.cast(end, dtype=types.FLOAT)}
    resized = _resize(padded, sides, new_sides, view, dtype=types.FLOAT, **region)
    colors, weights = (fn.slice(resized, start=[first], shape=[count], axes=[2]) for first, count in ((0, 3), (3, 1)))
    return fn.cast(colors / weights, dtype=types.UINT8)


def _square(source, view: View, draws):  # noqa: ARG001 - all views have one form
    return _resize_and_crop(source, view.size, view, _resize)


def _pad_crop(source, view: View, draws):
    pixels = _square(source, view, draws)
    return fn.flip(_pad_and_crop(pixels, view, draws["crop"]), horizontal=draws["flip"])


def _pad_and_crop(pixels, view: View, crop):
    """Pad each side by `view.padding` and cut `size` x `size` at the drawn (y, x), int32 [2]."""
    size = [view.size, view.size]
    if view.border == "zero":
        start = crop - view.padding
        return fn.slice(pixels, start=start, shape=size, axes=[0, 1], out_of_bounds_policy="pad", fill_values=0)
    for axis in (0, 1):
        pixels = _reflect(pixels, axis, view.padding, view.size)
    return fn.slice(pixels, start=crop, shape=size, axes=[0, 1])


def _reflect(pixels, axis: int, padding: int, size: int):
    """Mirror `padding` pixels at both ends, without repeating the edge."""
    turn = {"vertical": 1, "horizontal": 0} if axis == 0 else {"vertical": 0, "horizontal": 1}
    before = fn.flip(fn.slice(pixels, start=[1], shape=[padding], axes=[axis]), **turn)
    after = fn.flip(fn.slice(pixels, start=[size - 1 - padding], shape=[padding], axes=[axis]), **turn)
    return fn.cat(before, pixels, after, axis=axis)


_VIEWS = {
    "random_resized_crop": _random_resized_crop,
    "pad_crop": _pad_crop,
    "center_crop": _center_crop,
    "square": _square,
    "window": _window,
    "whole": _whole,
}


def _filter(view: View) -> dict[str, Any]:
    return {"interp_type": _FILTERS[view.interpolation], "antialias": True}


def _half_to_even(difference):
    half = difference // 2
    odd = difference - 2 * half
    return half + odd * (half - 2 * (half // 2))


# --------------------------------------------------------------------------------------- augmented views


def _flipped(pixels, view: View, run: ViewRun, draws):  # noqa: ARG001 - all augmented views have one form
    return fn.flip(pixels, horizontal=draws["augmented_flip"])


def _crop_flipped(pixels, view: View, run: ViewRun, draws):  # noqa: ARG001 - all augmented views have one form
    moved = _pad_and_crop(pixels, view, draws["augmented_crop"])
    return fn.flip(moved, horizontal=draws["augmented_flip"])


def _policy(pixels, view: View, run: ViewRun, draws):
    from dalikd.pipelines.operations import apply_policy  # here: DALI's modules of operations warn when imported

    return apply_policy(run.kind, pixels, run.ops, view.size, draws)


_AUGMENTED = {
    "flip": _flipped,
    "crop_flip": _crop_flipped,
    "autoaugment": _policy,
    "randaugment": _policy,
    "trivialaugment": _policy,
}
