from typing import NamedTuple

import numpy as np
import pytest
import torch

from dalikd.pipelines.transfer import DeviceTransfer, pack, unpack

CPU = torch.device("cpu")


class Stream(NamedTuple):
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
        transfer.advance()
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
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream(0 if device != cuda else handle))
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *sizes, **options: empty(*sizes, **{**options, "device": CPU}))
    transfer = DeviceTransfer(cuda, buffers)
    pixels = transfer.pixels("view0", Output())
    assert (pixels.shape, pixels.dtype) == ((4, 2, 2, 3), torch.uint8)
    ((pointer, stream, options),) = calls
    assert (pointer.value, stream.value or 0, options) == (pixels.data_ptr(), handle, {"non_blocking": True})
