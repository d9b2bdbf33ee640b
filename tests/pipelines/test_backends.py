"""Batches from shards, and what brings a batch to the device. The loader's own tests cover files and arrays."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image

from dalikd.pipelines.backends import DaliBackend, DeviceTransfer, ShardBackend, UnfitError, pack, unpack
from dalikd.pipelines.data import open_source
from dalikd.pipelines.datasets.file_list import FileList
from dalikd.pipelines.draw_spec import Batch, DrawSpec, MixRun, View, ViewRun
from dalikd.pipelines.loader import BadFileError, Loader, decode_source
from dalikd.pipelines.sampler import Sampler
from dalikd.pipelines.shards import write as convert
from dalikd.pipelines.shards.read import ShardSet
from dalikd.pipelines.shards.write import WriteOptions, write_shards
from dalikd.pipelines.sources import Source

CPU = torch.device("cpu")
TRAINING = DrawSpec(View(32, "random_resized_crop"), 7, (ViewRun("crop_flip"),), (MixRun("derangement"),), mix_group=8)
EVALUATION = DrawSpec(View(32, "center_crop", resize=32))


def _loader(source: Source, spec: DrawSpec = TRAINING, batch_size: int = 32, **options: Any) -> Loader:
    return Loader(source, Sampler(len(source), batch_size, seed=7), spec, threads=1, **options)


def _same(one: Batch, two: Batch) -> bool:
    assert len(one.augmented) == len(two.augmented) == 1
    tensors = [(one.images, two.images), (one.ids, two.ids), (one.labels, two.labels)]
    tensors += zip(one.augmented, two.augmented, strict=True)
    tensors += zip(one.mix[0][:3], two.mix[0][:3], strict=True)
    return all(torch.equal(a, b) for a, b in tensors)


def _from_files(loader: Loader, like: Batch, position: int, monkeypatch: pytest.MonkeyPatch) -> Batch:
    """The batch of the same rows and draws, read from files."""
    backend = loader._backend
    assert type(backend) is DaliBackend
    backend.close()
    plan = DaliBackend.plan(backend, position, like.ids.numpy())
    monkeypatch.setattr(backend, "plan", lambda _: plan)
    loader.position = position
    return loader.next()


def test_pixels_labels_and_draws_are_those_of_the_files(written, monkeypatch):
    """A row looks the same in the same epoch, wherever it is read from."""
    loader, files = _loader(written.open()), _loader(written.source)
    for position in (1, 12):  # 9 batches an epoch
        loader.seek(position)
        batch = loader.next()
        assert _same(batch, _from_files(files, batch, position, monkeypatch))
        assert batch.labels.tolist() == written.source.labels[batch.ids].tolist()


def test_training_goes_through_epochs(written):
    loader = _loader(written.open())
    epochs = [torch.cat([batch.ids for batch in loader]).tolist() for _ in range(3)]
    assert all(len(set(ids)) == len(ids) == 288 for ids in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert loader.position == 27


@pytest.mark.parametrize("position", [1, 8, 9, 20])
def test_resuming_is_exact(written, position):
    whole = _loader(written.open())
    for _ in range(position):
        whole.next()
    resumed = _loader(written.open(), prefetch=3)
    resumed.load_state_dict(whole.state_dict())
    assert all(_same(whole.next(), resumed.next()) for _ in range(4))


def test_held_batches_stay_as_they_were(written):
    loader = _loader(written.open(), batch_size=16)
    held = [loader.next() for _ in range(8)]
    copies = [batch.images.clone() for batch in held]
    for _ in range(8):
        loader.next()
    assert all(torch.equal(batch.images, copy) for batch, copy in zip(held, copies, strict=True))


def test_evaluation_shows_every_image_once(written):
    source = written.open()
    for world in (1, 3):
        seen, sizes = [], []
        for rank in range(world):
            sampler = Sampler(300, 96, shuffle=False, drop_last=False, world=world, rank=rank)
            loader = Loader(source, sampler, EVALUATION, threads=1)
            for _ in range(2):  # two passes
                batches = list(loader)
                seen += [row for batch in batches for row in batch.ids.tolist()]
                sizes.append([batch.total for batch in batches])
        assert sizes == [[96, 96, 96, 12]] * 2 * world
        assert sorted(seen) == sorted(2 * list(range(300)))


def test_a_resident_set_can_be_read_from_containers(written):
    source, spec = written.open(), DrawSpec(View(32, "pad_crop"), 7)
    resident = decode_source(source, spec.view, device=torch.device("cpu"), threads=1)
    kept, files = _loader(source, spec, resident=resident), _loader(written.source, spec)
    for _ in range(3):
        one, two = kept.next(), files.next()
        assert torch.equal(one.ids, two.ids)
        assert torch.equal(one.images, two.images)
    assert kept.state_dict() == files.state_dict()  # a resident set has the sampler's order


# ----------------------------------------------------------------------------------------------- resuming


def test_a_state_of_another_order_is_refused(written, tmp_path):
    source = written.open()
    state = _loader(source).state_dict()
    with pytest.raises(ValueError, match="order was containers"):
        _loader(written.source).load_state_dict(state)
    with pytest.raises(ValueError, match="order was by row, now it is containers"):
        _loader(source).load_state_dict(_loader(written.source).state_dict())
    two = Loader(source, Sampler(300, 32, seed=7, world=2), TRAINING, threads=1)
    with pytest.raises(ValueError, match=r"in 1 share\(s\), now it is .* in 2 share\(s\)"):
        two.load_state_dict(state)
    write_shards(written.source, tmp_path / "train", WriteOptions(written.format, seed=9, threads=1))
    with pytest.raises(ValueError, match="order was containers"):
        _loader(open_source(written.format, tmp_path, "train")).load_state_dict(state)


def test_a_state_without_an_order_is_one_of_files(written):
    state = _loader(written.source).state_dict()
    del state["order"]
    _loader(written.source).load_state_dict(state)
    with pytest.raises(ValueError, match="order was by row"):
        _loader(written.open()).load_state_dict(state)


# ---------------------------------------------------------------------------------------------- bad files


@pytest.fixture
def spoiled(written, tmp_path) -> tuple[Source, list[int]]:
    """The same shards with two bad images, in batches 1 and 11 of a training."""
    loader, rows = _loader(written.open()), []
    for position, slot in ((1, 5), (11, 0)):
        loader.seek(position)
        rows.append(int(loader.next().ids[slot]))
    tree = tmp_path / "tree"
    shutil.copytree(written.source.files.root, tree)
    paths = [tree / Path(written.source.path(row)).relative_to(written.source.files.root) for row in rows]
    paths[0].write_bytes(paths[0].read_bytes()[:-200])  # the pixels end early
    paths[1].write_bytes(b"\xff\xd8\xff no image")
    source = open_source("imagefolder", tree, "train", split=".")
    write_shards(source, tmp_path / "out/train", WriteOptions(written.format, seed=4, shard_images=70, threads=1))
    return open_source(written.format, tmp_path / "out", "train"), rows


def test_a_bad_image_stops_the_run_by_name(spoiled):
    source, rows = spoiled
    loader = _loader(source)
    loader.next()
    with pytest.raises(BadFileError, match=rf"{rows[0]:09d}.* \(the JPEG is truncated\).*--data\.bad_files replace"):
        loader.next()
    assert loader.position == 1


def test_a_bad_image_is_replaced_and_nothing_else_moves(written, spoiled, capsys, monkeypatch):
    source, rows = spoiled
    opened = _count_streams(monkeypatch)
    loader, clean = _loader(source, bad_files="replace"), _loader(written.source)
    whole = _loader(written.open())
    for position in range(16):
        batch, expected = loader.next(), whole.next()
        ids = [loader.replaced.get(row, row) for row in expected.ids.tolist()]
        assert batch.ids.tolist() == ids
        kept = torch.tensor([row not in rows for row in expected.ids.tolist()])
        assert torch.equal(batch.images[kept], expected.images[kept])
        if position == 1:
            slot = kept.tolist().index(False)
            plan = replace(clean._backend.plan(1, expected.ids.numpy()), rows=np.array(ids))  # another's image
            monkeypatch.setattr(clean._backend, "plan", lambda _, plan=plan: plan)
            assert torch.equal(batch.images[slot], clean._backend.fetch(1).images[slot])
    assert set(loader.replaced) == set(rows)
    out = capsys.readouterr().out
    assert out.count("cannot decode") == 2
    assert all(f"{row:09d}" in out for row in rows)
    assert opened() == [3, 3]  # two epochs and the one ahead: after a bad image nothing was read again


def _count_streams(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Counts the streams of `loader` and `whole` above by the shards they read."""
    from dalikd.pipelines.shards import stream as streams

    opened: dict[int, int] = {}

    class Counted(streams.ShardStream):
        def __init__(self, shards: ShardSet, shuffle: Any, batch_size: int) -> None:
            opened[id(shards)] = opened.get(id(shards), 0) + 1
            super().__init__(shards, shuffle, batch_size)

    monkeypatch.setattr(streams, "ShardStream", Counted)
    return lambda: list(opened.values())


def test_replacements_survive_a_resume(spoiled):
    source, rows = spoiled
    loader = _loader(source, bad_files="replace")
    for _ in range(3):
        loader.next()
    resumed = _loader(source, bad_files="replace")
    resumed.load_state_dict(loader.state_dict())
    assert list(resumed.replaced) == rows[:1]
    for _ in range(10):
        assert _same(loader.next(), resumed.next())


def test_a_resident_set_holds_the_replacements(spoiled):
    source, rows = spoiled
    view, cpu = View(32, "pad_crop"), torch.device("cpu")
    resident = decode_source(source, view, device=cpu, threads=1, bad_files="replace")
    assert set(resident.replaced) == set(rows)
    for row, other in resident.replaced.items():
        assert torch.equal(resident.pixels[row], resident.pixels[other])


def test_rare_kinds_in_containers_are_looked_at_too(tmp_path, small_images, monkeypatch):
    photo = Image.open(small_images / "ant" / "000.jpg").copy()
    folder = tmp_path / "tree" / "class"
    folder.mkdir(parents=True)
    photo.save(folder / "0.jpg")
    photo.save(folder / "1.tif")
    photo.convert("CMYK").save(folder / "2.jpg", quality=95)
    cmyk = (folder / "2.jpg").read_bytes()
    (folder / "2.jpg").write_bytes(cmyk.replace(b"\xff\xee\0\x0eAdobe\0d\0\0\0\0\0", b""))
    photo.save(folder / "3.tif", tiffinfo={274: 3})
    monkeypatch.setattr(convert, "refusal", lambda *_: None)  # as an earlier version wrote them
    monkeypatch.setattr(convert, "_check_apart", lambda *_: None)
    write_shards(
        open_source("imagefolder", tmp_path / "tree", "train", split="."),
        tmp_path / "out/train",
        WriteOptions(threads=1),
    )
    source = open_source("webdataset", tmp_path / "out", "train")
    sampler, spec = Sampler(4, 4, shuffle=False, drop_last=False), DrawSpec(View(32, "square"))
    with pytest.raises(BadFileError, match=r"tar:000000003\.tiff \(TIFF with an orientation tag \(3\)"):
        Loader(source, sampler, spec, threads=1).next()
    batch = Loader(source, sampler, spec, threads=1, bad_files="replace").next()
    assert sorted(batch.ids.tolist()) == [0, 0, 1, 2]
    for image in batch.images.numpy():
        assert np.abs(image.astype(np.int64) - np.asarray(photo)).mean() < 12  # JPEG's own loss


def test_a_reader_does_not_keep_more_than_it_needs(written):
    loader = _loader(written.open(), batch_size=16)
    backend = loader._backend
    assert isinstance(backend, ShardBackend)
    for index in range(18):
        loader.feed(index)  # plans that no pipeline takes
    assert len(backend._read) == 2 + 5
    loader.close()
    assert not backend._read


# ------------------------------------------------------------------------------------------- truncated JPEGs


def test_on_a_gpu_a_jpeg_that_is_cut_off_is_found_by_its_end(small_images: Path, tmp_path: Path):
    """Other ends are looked at once."""
    folder = tmp_path / "a"
    folder.mkdir()
    names = sorted(small_images.rglob("*.jp*g"))[:3]
    whole, trailed, cut = (path.read_bytes() for path in names)
    for number, content in enumerate((whole, trailed + b"tail", cut[:-40])):
        (folder / f"{number}.jpg").write_bytes(content)
    loader = _loader(open_source("imagefolder", tmp_path, "train", split="."), EVALUATION, 3)
    backend = loader._backend
    assert isinstance(backend, DaliBackend)
    jpeg, shape = np.full(3, 0xD8, np.uint8), np.full((3, 3), 3.0, np.float32)
    end = np.tile(np.uint8([0xFF, 0xD9]), (3, 1))
    plan = replace(backend.plan(0), rows=np.arange(3))
    assert not backend._look(plan, jpeg, shape, end)
    assert backend._fit == set()
    end[1] = 0
    assert not backend._look(plan, jpeg, shape, end)
    assert backend._fit == {1}
    end[2] = 0
    with pytest.raises(UnfitError):
        backend._look(plan, jpeg, shape, end)
    assert not backend._look(plan, jpeg, shape)  # the CPU's decoder says so itself


def test_paths_come_as_one_array_that_ends_in_zeros():
    files = FileList.from_paths(["/r/a.jpg", "/r/käse.png", "/r/c/d.bmp"], "/r")
    pixels = {"mean": (0.5, 0.5, 0.5), "std": (0.2, 0.2, 0.2), "image_size": 32}
    source = Source(name="r", split="train", classes=("a",), labels=np.zeros(3, np.int64), files=files, **pixels)
    loader = Loader(source, Sampler(3, 3, shuffle=False), EVALUATION, threads=1)
    loader.replaced |= {0: 2, 2: 0}
    (padded,) = loader.feed(0)
    assert padded.dtype == np.uint8
    assert [row.tobytes().rstrip(b"\0").decode() for row in padded] == ["/r/c/d.bmp", "/r/käse.png", "/r/a.jpg"]
    assert (padded[:, -1] == 0).tolist() == [True, False, True]


# -------------------------------------------------------------------------------- to the device


class _CudaStream(NamedTuple):
    cuda_stream: int


def _arrays(count: int = 5) -> dict[str, np.ndarray]:
    return {
        "labels": np.arange(count),
        "lam": np.linspace(0, 1, count, dtype=np.float32),
        "center": np.arange(2 * count, dtype=np.float32).reshape(2, count).T,  # not contiguous
        "flags": np.arange(count, dtype=np.uint8) % 2,
        "half": np.arange(3 * count, dtype=np.float16).reshape(count, 3),
    }


def test_packed_arrays_come_out_as_they_went_in():
    arrays = _arrays()
    packed, layout = pack(arrays)
    assert packed.dtype == torch.uint8
    assert all(start % 16 == 0 for start, _, _ in layout.values())
    for name, tensor in unpack(packed.clone(), layout).items():
        assert np.array_equal(tensor.numpy(), arrays[name])
        assert tensor.numpy().dtype == arrays[name].dtype


def test_arrays_of_no_rows_are_packed():
    packed, layout = pack(_arrays(0))
    assert packed.numel() == 0
    assert {name: tensor.shape[0] for name, tensor in unpack(packed, layout).items()} == dict.fromkeys(_arrays(), 0)


def test_on_the_cpu_nothing_is_copied():
    transfer, labels = DeviceTransfer(CPU), np.arange(4)
    tensor = transfer.arrays({"labels": labels})["labels"]
    assert tensor.data_ptr() == labels.__array_interface__["data"][0]
    pixels = torch.zeros(2, 3)
    assert transfer.pixels("images", pixels).data_ptr() == pixels.data_ptr()
    assert transfer.arrays({}) == {}


@pytest.mark.parametrize("buffers", [1, 2, 3])
def test_buffers_are_used_in_turn(buffers):
    transfer = DeviceTransfer(CPU, buffers)
    held, places = [], []
    for number in range(2 * buffers):
        transfer.turn += 1
        images = transfer.pixels("images", torch.full((4, 2), number))
        labels = transfer.arrays({"labels": np.full(4, number)})["labels"]
        held.append((images, labels))
        places.append((images.data_ptr(), labels.data_ptr()))
        for back in range(buffers):  # the last `buffers` batches still hold what they held
            if number >= back:
                assert all((tensor == number - back).all() for tensor in held[number - back])
    assert places[:buffers] == places[buffers:]
    assert len(set(places)) == buffers


def test_a_short_batch_lies_in_the_same_buffer():
    transfer = DeviceTransfer(CPU, 1)
    whole = transfer.pixels("images", torch.ones(4, 2))
    short = transfer.pixels("images", torch.zeros(3, 2))
    assert short.shape == (3, 2)
    assert short.data_ptr() == whole.data_ptr()
    assert whole.tolist() == [[0, 0]] * 3 + [[1, 1]]
    assert transfer.pixels("images", torch.ones(6, 2)).shape == (6, 2)  # a larger one gets a new buffer


@pytest.mark.parametrize(("buffers", "handle"), [(0, 0), (2, 77)])
def test_on_a_gpu_dali_copies_on_the_current_stream(monkeypatch, buffers, handle):
    """Without DLPack, whose memory is freed after a wait for the whole device."""
    calls: list[tuple] = []

    class Output:
        def shape(self) -> list[int]:
            return [4, 2, 2, 3]

        def copy_to_external(self, *given, **named) -> None:
            calls.append((*given, named))

        def __dlpack__(self, **_):
            pytest.fail("DLPack was asked")

        __dlpack_device__ = __dlpack__

    cuda = torch.device("cuda", 1)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: _CudaStream(0 if device != cuda else handle))
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *sizes, **options: empty(*sizes, **{**options, "device": CPU}))
    transfer = DeviceTransfer(cuda, buffers)
    pixels = transfer.pixels("view0", Output())
    assert (pixels.shape, pixels.dtype) == ((4, 2, 2, 3), torch.uint8)
    ((pointer, stream, options),) = calls
    assert (pointer.value, stream.value or 0, options) == (pixels.data_ptr(), handle, {"non_blocking": True})
