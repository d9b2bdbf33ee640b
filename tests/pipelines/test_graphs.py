# DALI's and torchvision's annotations know neither DALI's nodes nor Pillow's images.
# pyright: reportAttributeAccessIssue=false, reportArgumentType=false

import itertools
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from nvidia.dali import backend, fn
from nvidia.dali.pipeline import pipeline_def
from PIL import Image
from torch import Tensor
from torchvision.transforms import (
    AutoAugment,
    AutoAugmentPolicy,
    CenterCrop,
    InterpolationMode,
    RandAugment,
    Resize,
    TrivialAugmentWide,
)
from torchvision.transforms import autoaugment as published
from torchvision.transforms import functional as transforms

from dalikd.pipelines import graphs
from dalikd.pipelines.data import open_source
from dalikd.pipelines.draw_spec import DrawSpec, View, ViewRun
from dalikd.pipelines.draws import Microbatch, place_windows
from dalikd.pipelines.graphs import build_graph, input_names
from dalikd.pipelines.hardware import Decoding
from dalikd.pipelines.policies import POLICIES, RANDOM_OPERATIONS, operation_names, policy_table
from dalikd.pipelines.sources import Source

CROPS = ("random_resized_crop", "pad_crop", "center_crop")
AUGMENTED = ((), ("flip",), ("crop_flip",), ("autoaugment",), ("trivialaugment", "randaugment"))


@pytest.fixture(scope="module")
def source(photos: Path) -> Source:
    return open_source("imagefolder", photos, "train", split=".")


def _draw(view: View, runs: tuple[ViewRun, ...], rows: np.ndarray, seed: int = 1) -> dict[str, np.ndarray]:
    return DrawSpec(view, seed, runs).draw(Microbatch(0, 0, 0, rows, len(rows), len(rows))).views


def _run(
    view: View, images: list[np.ndarray], views: dict[str, np.ndarray], runs: tuple[ViewRun, ...] = ()
) -> list[np.ndarray]:
    """Outputs of a graph for one batch of paths (uint8 [n]) or pixels (uint8 [H, W, 3])."""
    names = input_names(view, runs)[1:]
    if "start" in names:
        start, shape = _windows(view, images, views)
        views = {**views, "start": start, "shape": shape}
    batch = (images, *(np.ascontiguousarray(views[name]) for name in names))
    graph = build_graph(
        lambda _: batch,
        view,
        runs,
        reader="files" if images[0].ndim == 1 else "arrays",
        batch_size=len(images),
        threads=1,
        device_id=None,
    )
    return [np.array(output.as_tensor()) for output in graph.run()[: 1 + len(runs)]]


def _windows(view: View, images: list[np.ndarray], views: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    shapes = [p.shape[:2] if p.ndim > 1 else Image.open(p.tobytes()).size[::-1] for p in images]
    return place_windows(views["tries"], views["offsets"], np.array(shapes), view.ratio)


def _view_of_all(source: Source, view: View, seed: int = 1) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    rows = np.arange(len(source))
    views = _draw(view, (), rows, seed)
    assert source.files is not None
    return _run(view, source.files.encoded(rows), views)[0], views


def _open(source: Source, row: int) -> Image.Image:
    return Image.open(source.path(row)).convert("RGB")


def _difference(a: Any, b: Any) -> np.ndarray:
    return np.abs(np.asarray(a).astype(int) - np.asarray(b).astype(int))


# -------------------------------------------------------------------------------------- random_resized_crop


@pytest.mark.parametrize("scale", [(0.08, 1.0), (0.9, 1.0)])
@pytest.mark.parametrize("size", [224, 64])
def test_random_resized_crop_shows_what_pillow_cuts_and_resizes(source, size, scale):
    """Within 1 grey level; but at the border DALI's filter repeats the edge, Pillow's stays inside the window, so the
    outermost pixels may differ by an eighth of the contrast there."""
    view = View(size, "random_resized_crop", scale=scale)
    pixels, views = _view_of_all(source, view)
    assert 0 < views["flip"].sum() < len(source)
    assert source.files is not None
    windows = np.hstack(_windows(view, source.files.encoded(np.arange(len(source))), views)).astype(int).tolist()
    for row, (y, x, height, width) in enumerate(windows):
        image = _open(source, row)
        expected = image.crop((x, y, x + width, y + height)).resize((size, size), Image.Resampling.BILINEAR)
        expected = transforms.hflip(expected) if views["flip"][row] else expected
        difference = _difference(pixels[row], expected)
        assert difference[1:-1, 1:-1].max() <= 1, source.path(row)
        assert difference.max() <= 32, source.path(row)
        assert difference.mean() < 0.3, source.path(row)


# ------------------------------------------------------------------------------------------------ center_crop


@pytest.mark.parametrize(
    ("resize", "size"), [(256, 224), (224, 224), (225, 224), (226, 224), (64, 64), (73, 64), (33, 32), (16, 16)]
)
def test_center_crop_is_torchvisions_within_one_grey_level(source, resize, size):
    """Down and (the tiny image, and up to 224 for others) up, on every pixel of every image."""
    pixels, _ = _view_of_all(source, View(size, "center_crop", resize=resize))
    assert pixels.shape == (len(source), size, size, 3)
    for row in range(len(source)):
        expected = CenterCrop(size)(Resize(resize, antialias=True)(_open(source, row)))
        assert _difference(pixels[row], expected).max() <= 1, source.path(row)


@pytest.mark.parametrize(("resize", "size"), [(64, 64), (40, 32)])
def test_center_crop_of_noise_is_torchvisions_within_one_grey_level(resize, size):
    """The hardest content there is, up to the border; sides odd and even, down and up."""
    random = np.random.default_rng(5)
    sides = [(97, 64), (64, 131), (201, 200), (65, 65), (500, 333), (40, 31), (64, 64), (11, 90)]
    images = [random.integers(0, 256, (*side, 3), dtype=np.uint8) for side in sides]
    pixels = _run(View(size, "center_crop", resize=resize), images, {})[0]
    for found, image in zip(pixels, images, strict=True):
        expected = CenterCrop(size)(Resize(resize, antialias=True)(Image.fromarray(image)))
        assert _difference(found, expected).max() <= 1, image.shape


@pytest.mark.parametrize(("resize", "size"), [(256, 224), (64, 64)])
def test_bicubic_center_crop_is_close_to_torchvisions(source, resize, size):
    """Pillow rounds and clips between its two passes, DALI does not: 8 grey levels at hard edges, 0.3 on average."""
    pixels, _ = _view_of_all(source, View(size, "center_crop", resize=resize, interpolation="bicubic"))
    for row in range(len(source)):
        resized = Resize(resize, InterpolationMode.BICUBIC, antialias=True)(_open(source, row))
        difference = _difference(pixels[row], CenterCrop(size)(resized))
        assert difference.max() <= 8, source.path(row)
        assert difference.mean() < 0.3, source.path(row)


def _row_of(source: Source, name: str) -> int:
    return next(row for row in range(len(source)) if Path(source.path(row)).stem == name)


def test_exif_orientation_is_ignored(source):
    row = _row_of(source, "turned")
    image = Image.open(source.path(row))
    assert image.getexif()[0x0112] == 6
    pixels, _ = _view_of_all(source, View(64, "center_crop", resize=73))
    expected = CenterCrop(64)(Resize(73)(image))
    assert _difference(pixels[row], expected).max() <= 1
    turned = CenterCrop(64)(Resize(73)(image.transpose(Image.Transpose.ROTATE_270)))
    assert _difference(pixels[row], turned).mean() > 10


def test_gray_becomes_rgb(source):
    row = _row_of(source, "gray")
    assert Image.open(source.path(row)).mode == "L"
    pixels, _ = _view_of_all(source, View(64, "center_crop", resize=73))
    assert (pixels[row] == pixels[row][:, :, :1]).all()
    assert pixels[row].std() > 10


def test_pad_crop_of_files_cuts_the_resized_centre(source):
    """Larger and smaller images than the view; zero border."""
    view = View(64, "pad_crop", padding=8)
    pixels, views = _view_of_all(source, view)
    for row in range(len(source)):
        centre = CenterCrop(64)(Resize(64, antialias=True)(_open(source, row)))
        padded = np.pad(np.asarray(centre), ((8, 8), (8, 8), (0, 0)))
        y, x = views["crop"][row]
        expected = padded[y : y + 64, x : x + 64]
        expected = expected[:, ::-1] if views["flip"][row] else expected
        difference = _difference(pixels[row], expected)
        assert difference.max() <= 32, source.path(row)  # the border of the resized centre, as above
        assert (difference > 1).mean() < 0.02, source.path(row)


# ------------------------------------------------------------------------------------------- no random operator


def _name(operator: Any) -> str:
    """Schema name of an operator of a built graph: it prints itself as `OpSpec for <name>:`."""
    match = re.match(r"OpSpec for (\w+):", str(operator.spec))
    assert match is not None
    return match.group(1)


def _operators(graph: Any) -> set[str]:
    return {_name(operator) for operator in graph._ops}


def _draws_by_itself(name: str) -> bool:
    """Whether an operator's schema has a random generator or keeps a state from batch to batch."""
    schema = backend.GetSchema(name)
    return schema.HasRandomSeedArg() or schema.HasRandomStateArg() or schema.IsStateful()


def test_the_check_for_random_operators_finds_them():
    @pipeline_def(batch_size=2, num_threads=1, device_id=None)
    def random_graph():
        pixels = fn.random_resized_crop(np.zeros((4, 4, 3), np.uint8), size=[2, 2])
        return pixels, fn.random.coin_flip(), fn.random.beta(), fn.random.uniform(), fn.batch_permutation()

    graph = random_graph()
    graph.build()
    random_names = {name for name in _operators(graph) if _draws_by_itself(name)}
    assert random_names == {
        "RandomResizedCrop",
        "random__CoinFlip",
        "random__Beta",
        "random__Uniform",
        "BatchPermutation",
    }


@pytest.mark.parametrize("reader", ["files", "arrays"])
@pytest.mark.parametrize(("crop", "augmented"), list(itertools.product(CROPS, AUGMENTED)))
def test_no_graph_has_a_random_operator(reader, crop, augmented):
    """Every draw must come in through `ExternalSource`; an operator that draws, by name or by schema, would make a
    image depend on its slot in the batch. ExternalSource keeps a queue, no random state: it alone may be stateful."""
    view = View(32, crop, resize=32, border="reflect")
    runs = tuple(map(ViewRun, augmented))
    graph = build_graph(lambda _: (), view, runs, reader=reader, batch_size=2, threads=1, device_id=None)
    names = _operators(graph)
    assert "ExternalSource" in names
    assert ("io__file__Read" in names) == (reader == "files")
    assert not [name for name in names if re.search("random|coin|uniform|normal|beta|noise|permut|jitter", name, re.I)]
    assert not [name for name in names - {"ExternalSource"} if _draws_by_itself(name)]


def _comes_from(node: Any, name: str) -> bool:
    operator = node.source
    return _name(operator) == name or any(_comes_from(other, name) for other in operator.inputs)


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("crop", [*CROPS, "window"])
def test_decoding_depends_on_the_peeked_shape(crop, whole):
    """Peeking first makes a header that cannot be parsed an exception; the decoder by itself may crash the process."""
    view = View(32, crop, resize=32)
    graph: Any = build_graph(
        lambda _: (), view, reader="files", batch_size=2, threads=1, device_id=None, decoding=Decoding(whole=whole)
    )
    (decoder,) = (operator for operator in graph._ops if "decoders" in _name(operator))
    if whole:
        assert _name(decoder) == "decoders__Image"
        assert _comes_from(decoder.inputs[0], "PeekImageShape")
        return
    assert _name(decoder) == "decoders__ImageSlice"
    encoded, start, shape = decoder.inputs
    assert _comes_from(encoded, "PeekImageShape") == (crop in ("pad_crop", "center_crop"))  # by the number of pixels
    assert _comes_from(start, "PeekImageShape")
    assert _comes_from(shape, "PeekImageShape")


def test_little_is_computed_in_a_graph_of_windows():
    """Each operator on scalars costs DALI what a thread's work on a small image does."""
    graph: Any = build_graph(lambda _: (), View(32, "window"), reader="files", batch_size=2, threads=1, device_id=None)
    assert len(graph._ops) <= 19


def test_a_window_ends_where_its_image_does():
    image = np.arange(40 * 30 * 3, dtype=np.uint8).reshape(40, 30, 3)
    windows = {"start": np.array([[35, 5], [50, 2]], np.float32), "shape": np.array([[10, 20], [9, 90]], np.float32)}
    batch = ([image, image], windows["start"], windows["shape"])
    view = View(32, "window")
    graph = build_graph(lambda _: batch, view, reader="arrays", batch_size=2, threads=1, device_id=None)
    (found,) = graph.run()
    assert np.array_equal(found.at(0), image[35:, 5:25])
    assert np.array_equal(found.at(1), image[39:, 2:])


# --------------------------------------------------------------------------------------------- several views


def test_each_view_is_what_a_graph_with_that_view_alone_makes(source):
    """In any order, and twice with different draws."""
    view, rows = View(64, "random_resized_crop", border="reflect"), np.arange(len(source))
    kinds = ("trivialaugment", "flip", "crop_flip")
    runs = (*map(ViewRun, kinds), ViewRun("randaugment", 1, ops=1), ViewRun("trivialaugment", 1))
    assert source.files is not None
    images = source.files.encoded(rows)
    base, *together = _run(view, images, _draw(view, runs, rows), runs)
    for run, found in zip(runs, together, strict=True):
        same_base, alone = _run(view, images, _draw(view, (run,), rows), (run,))
        assert np.array_equal(base, same_base)
        assert np.array_equal(found, alone), run
    assert _difference(together[0], together[-1]).mean() > 5


def test_the_views_of_one_graph_share_one_decoder():
    runs = tuple(map(ViewRun, ("flip", "crop_flip", "autoaugment")))
    view = View(32, "random_resized_crop")
    graph: Any = build_graph(lambda _: (), view, runs, reader="files", batch_size=2, threads=1, device_id=None)
    names = [_name(operator) for operator in graph._ops]
    assert [names.count(name) for name in ("io__file__Read", "decoders__ImageSlice", "Resize")] == [1, 1, 1]


def test_inputs_are_named_by_the_number_of_their_view():
    runs = tuple(map(ViewRun, ("flip", "crop_flip", "trivialaugment", "flip")))
    assert input_names(View(32, "pad_crop"), runs) == (
        "source", "crop", "flip", "augmented_flip0", "augmented_crop1", "augmented_flip1",
        "operation2", "magnitude2", "sign2", "augmented_flip3",
    )  # fmt: skip


# --------------------------------------------------------------------------------------------------- policies


@pytest.mark.parametrize("kind", sorted(POLICIES))
def test_a_policy_of_a_sample_does_not_depend_on_its_batch(small_images, kind):
    runs = (ViewRun(kind),)
    source = open_source("imagefolder", small_images, "train", split=".")
    assert source.files is not None
    view = View(32, "pad_crop")
    rows = np.random.default_rng(0).permutation(len(source))[:128]
    forward = _run(view, source.files.encoded(rows), _draw(view, runs, rows), runs)
    backward = _run(view, source.files.encoded(rows[::-1]), _draw(view, runs, rows[::-1]), runs)
    part = _run(view, source.files.encoded(rows[40:47]), _draw(view, runs, rows[40:47]), runs)
    for output in (0, 1):
        assert np.array_equal(forward[output], backward[output][::-1])
        assert np.array_equal(forward[output][40:47], part[output])
    assert _difference(*forward).mean() > 10


def _apply(size: int, images: np.ndarray, steps: list[tuple[str, int, int]], kind: Any = "autoaugment") -> np.ndarray:
    """Each (operation, magnitude bin, sign) on each of the images: uint8 [steps, n, size, size, 3]."""
    names = operation_names(kind, size)
    run = ViewRun(kind)
    columns = np.repeat(np.array([(names.index(name), *rest) for name, *rest in steps], np.int32), len(images), axis=0)
    nothing = np.zeros_like(columns)
    views = {
        f"{name}0": np.stack([columns[:, k], nothing[:, k]], 1)[:, : run.ops]
        for k, name in enumerate(("operation", "magnitude", "sign"))
    }
    view = View(size, "center_crop", resize=size)
    outputs = _run(view, list(images) * len(steps), views, (run,))
    return outputs[1].reshape(len(steps), *images.shape)


@pytest.fixture(scope="module")
def squares(photos: Path) -> dict[int, np.ndarray]:
    """Natural squares of 32 and 96 pixels, cut from photos: uint8 [6, side, side, 3]."""
    paths = [
        photos / f"{name}.jpg" for name in ("bird/landscape", "bird/portrait", "boat/square", "boat/almost_square")
    ]
    paths += [photos / "tree/gray.jpg", photos / "tree/large.jpg"]
    images = [Image.open(path).convert("RGB") for path in paths]
    return {side: np.stack([np.asarray(CenterCrop(side)(Resize(side)(p))) for p in images]) for side in (32, 96)}


def _published_space(kind: str, side: int) -> dict[str, tuple[Tensor, bool]]:
    """torchvision's magnitudes of each operation, and whether they have a sign."""
    if kind == "autoaugment":
        return AutoAugment(AutoAugmentPolicy.IMAGENET)._augmentation_space(10, (side, side))
    if kind == "randaugment":
        return RandAugment()._augmentation_space(31, (side, side))
    return TrivialAugmentWide()._augmentation_space(31)


def _published_operation(kind: str, image: np.ndarray, name: str, magnitude: int, sign: int) -> np.ndarray:
    """torchvision's operation with bilinear interpolation and grey filling, whole pixels aside.

    Translations are by fractions of a pixel (torchvision truncates them), and a shear's sign, fair as it is, means the
    other direction; both keep the top left corner in place.
    """
    side = image.shape[0]
    magnitudes, signed = _published_space(kind, side)[name]
    value = float(magnitudes[magnitude]) if magnitudes.ndim else 0.0
    value = -value if signed and sign else value
    image, options = Image.fromarray(image), {"interpolation": InterpolationMode.BILINEAR, "fill": [128.0] * 3}
    if name.startswith("Translate"):
        shift = [value, 0] if name == "TranslateX" else [0, value]
        return np.asarray(transforms.affine(image, 0, shift, 1.0, [0.0, 0.0], **options))
    value = -value if name.startswith("Shear") else value
    return np.asarray(published._apply_op(image, name, value, **options))


# largest difference in the inner pixels, largest mean difference, in grey levels
EXACT, ROUNDED, RESAMPLED = (0, 0), (1, 1), (255, 2.5)
TOLERANCES = {
    "Invert": EXACT,
    "Posterize": EXACT,
    "Solarize": EXACT,
    "Brightness": ROUNDED,  # Pillow truncates, DALI rounds
    "AutoContrast": ROUNDED,
    "Contrast": ROUNDED,
    "Color": (2, 1),
    "Sharpness": (1, 3),  # Pillow leaves the border as it is, one pixel wide
    "Rotate": RESAMPLED,  # the border of the turned image is hard in one and soft in the other
    "TranslateX": RESAMPLED,
    "TranslateY": RESAMPLED,
    "ShearX": RESAMPLED,
    "ShearY": RESAMPLED,
}


@pytest.mark.parametrize("size", [32, 96])
@pytest.mark.parametrize(
    ("kind", "bins"), [("autoaugment", (0, 2, 5, 9)), ("randaugment", (0, 9, 30)), ("trivialaugment", (0, 4, 17, 30))]
)
def test_operations_are_torchvisions(squares, size, kind, bins):
    names = [name for name in operation_names(kind, size) if name in TOLERANCES]
    steps = list(itertools.product(names, bins, (0, 1)))
    for (name, magnitude, sign), results in zip(steps, _apply(size, squares[size], steps, kind), strict=True):
        largest, mean = TOLERANCES[name]
        for image, result in zip(squares[size], results, strict=True):
            difference = _difference(result, _published_operation(kind, image, name, magnitude, sign))
            assert difference[1:-1, 1:-1].max() <= largest, (name, magnitude, sign)
            assert difference.mean() <= mean, (name, magnitude, sign)


def test_every_operation_of_the_policies_is_tested():
    used = {name for policy in ("cifar10", "imagenet") for name in policy_table(policy)[0]}
    assert used == {*TOLERANCES, "identity", "Equalize"} >= set(RANDOM_OPERATIONS)


@pytest.mark.parametrize("size", [32, 96])
def test_identity_leaves_the_pixels_alone(squares, size):
    results = _apply(size, squares[size], [("identity", 9, 1)])
    assert np.array_equal(results[0], squares[size])


def test_equalize_is_histogram_equalisation(squares):
    """The textbook formula, as in OpenCV. Pillow divides by a whole number of pixels a level, 3 or 4 instead of 4.02
    for 32x32 pixels, and so ends too bright on small images."""
    results = _apply(32, squares[32], [("Equalize", 0, 0)])[0]
    for image, result in zip(squares[32], results, strict=True):
        for channel in range(3):
            values = image[:, :, channel]
            counts = np.bincount(values.ravel(), minlength=256).cumsum()
            first = counts[counts > 0][0]
            table = np.round((counts - first) * 255 / (values.size - first))
            assert _difference(result[:, :, channel], table[values]).max() <= 1


# ------------------------------------------------------------------------------------------------ on a GPU


class _StopError(Exception):
    pass


@pytest.mark.parametrize(
    ("decoding", "name"), [(Decoding(), "image_slice"), (Decoding(1.0), "image_slice"), (Decoding(1, True), "image")]
)
@pytest.mark.parametrize("crop", ["window", "center_crop"])
def test_a_gpu_is_told_how_to_decode(monkeypatch, crop, decoding, name):
    """Up to the decoder, as the graph is defined; building it takes a GPU."""
    found: dict[str, Any] = {}

    def stop(*_, **named):
        found.update(named)
        raise _StopError

    monkeypatch.setattr(graphs.fn.decoders, name, stop)
    with pytest.raises(_StopError):
        build_graph(
            lambda _: (),
            View(32, crop, resize=32),
            reader="files",
            batch_size=2,
            threads=1,
            device_id=0,
            decoding=decoding,
        )
    told = {"device": "mixed", "hw_decoder_load": decoding.hw_decoder_load, "jpeg_fancy_upsampling": True}
    assert told.items() <= found.items()


def test_whole_images_are_cut_to_the_pixels_of_windows(photos: Path):
    """Bit for bit on the CPU, down to a window that reaches beyond its image."""
    paths = sorted(photos.rglob("*.jp*g"))[:8]
    images = [np.frombuffer(path.read_bytes(), np.uint8) for path in paths]
    sides = np.array([Image.open(path).size[::-1] for path in paths])
    windows = np.random.default_rng(3).random((len(paths), 2))
    start = np.floor(windows * (sides - 9)).astype(np.float32)
    shape = np.floor(9 + (1 - windows) * 0.9 * sides).astype(np.float32)
    shape[0] += sides[0]
    made = []
    for whole in (False, True):
        graph = build_graph(
            lambda _: (images, start, shape),
            View(1, "window"),
            reader="bytes",
            batch_size=len(paths),
            threads=1,
            device_id=None,
            decoding=Decoding(whole=whole),
        )
        made.append([np.array(pixels) for pixels in graph.run()[0]])
    assert all(np.array_equal(one, two) for one, two in zip(*made, strict=True))


def test_the_last_bytes_come_out_where_they_are_asked_for(photos: Path):
    encoded = (next(photos.rglob("*.jp*g")).read_bytes(), next(photos.rglob("*.jp*g")).read_bytes() + b"tail")
    images = [np.frombuffer(content, np.uint8) for content in encoded]
    graph = build_graph(
        lambda _: (images,),
        View(32, "center_crop", resize=32),
        reader="bytes",
        batch_size=2,
        threads=1,
        device_id=None,
        ends=True,
    )
    assert [bytes(ends) for ends in np.array(graph.run()[3].as_tensor())] == [b"\xff\xd9", b"il"]


@pytest.mark.parametrize("whole", [False, True])
def test_an_image_of_more_pixels_than_allowed_is_not_decoded(photos: Path, whole: bool):
    path = next(photos.rglob("large.jpg"))
    for max_pixels, fails in ((640 * 427, False), (640 * 427 - 2, True)):
        graph: Any = build_graph(
            lambda _: ([np.frombuffer(path.read_bytes(), np.uint8)],),
            View(32, "center_crop", resize=32),
            reader="bytes",
            batch_size=1,
            threads=1,
            device_id=None,
            decoding=Decoding(whole=whole),
            max_pixels=max_pixels,
        )
        if fails:
            with pytest.raises(RuntimeError, match="decoders"):
                graph.run()
        else:
            graph.run()
