import subprocess
import sys
from contextlib import nullcontext
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from nvidia.dali import backend

from dalikd.pipelines import hardware
from dalikd.pipelines.doctor import decode_windows
from dalikd.pipelines.hardware import PLAIN, Decoding, decoding_on, driver_version, package_versions

CUDA = torch.device("cuda", 0)
DIES = "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)"
FAILS = "import sys; sys.exit('first words\\nnvImageCodec failure 8')"


@pytest.fixture
def source() -> SimpleNamespace:
    return SimpleNamespace(arrays=None)


@pytest.fixture(autouse=True)
def _asked_anew():
    for cached in (hardware.check_libraries, hardware._has_jpeg_engine, hardware._decodes_windows):
        cached.cache_clear()
    yield
    for cached in (hardware.check_libraries, hardware._has_jpeg_engine, hardware._decodes_windows):
        cached.cache_clear()


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A GPU with a JPEG engine, and nvImageCodec 0.9."""
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setattr(hardware, "check_libraries", lambda: None)
    monkeypatch.setattr(hardware, "_has_jpeg_engine", lambda index: index == 0)
    monkeypatch.setattr(hardware, "_loaded_codec", lambda: 900)
    monkeypatch.setattr(hardware, "_PROBE", "pass")
    return monkeypatch


# ------------------------------------------------------------------------------------------------- windows


@pytest.mark.parametrize(
    ("probe", "words"),
    [
        (DIES, "on this GPU (SIGSEGV): images are decoded whole"),
        (FAILS, "(nvImageCodec failure 8)"),
        ("import os; os._exit(3)", "(exit code 3)"),
        ("pass", None),
    ],
    ids=["dies", "fails", "leaves", "decodes"],
)
def test_windows_are_decoded_where_another_process_can(gpu, source, capsys, probe, words):
    gpu.setattr(hardware, "_PROBE", probe)
    assert [decoding_on(source, CUDA).whole for _ in range(2)] == 2 * [words is not None]
    said = capsys.readouterr().out
    assert said.count("\n") == (words is not None)
    assert words is None or words in said


def test_a_probe_that_hangs_is_ended(gpu, source, capsys):
    gpu.setattr(hardware, "_PROBE", "import time; time.sleep(60)")
    gpu.setattr(hardware, "_PROBE_SECONDS", 0.2)
    assert decoding_on(source, CUDA).whole
    assert "not done so in 0.2 seconds" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("version", "decode", "whole"), [(800, "auto", False), (900, "windows", False), (800, "whole", True)]
)
def test_nothing_is_probed_without_need(gpu, source, version, decode, whole):
    gpu.setattr(hardware, "_loaded_codec", lambda: version)
    gpu.setattr(hardware, "_PROBE", DIES)
    assert decoding_on(source, CUDA, decode).whole == whole


def test_an_unknown_version_is_probed(gpu, source):
    gpu.setattr(hardware, "_loaded_codec", lambda: None)
    gpu.setattr(hardware, "_PROBE", DIES)
    assert decoding_on(source, CUDA).whole


def test_the_cpu_and_images_in_memory_need_no_gpu(monkeypatch, source):
    monkeypatch.setattr(hardware, "check_libraries", lambda: pytest.fail("a GPU was asked"))
    assert decoding_on(source, torch.device("cpu"), "whole", 1) == PLAIN
    in_memory = SimpleNamespace(arrays=np.zeros(1))
    assert decoding_on(in_memory, CUDA) == PLAIN


def test_the_probe_decodes_windows():
    decode_windows(None, 0.0)


def test_the_probe_says_what_fails():
    """In a process of its own, as it is started."""
    code = (
        f"import sys; sys.path[:] = {sys.path!r}\n"
        "from dalikd.pipelines import graphs\n"
        "real = graphs.fn.decoders.image_slice\n"
        "graphs.fn.decoders.image_slice = lambda *given, **named: real(*given, **named) // 2\n"
        f"{hardware._PROBE.format(index=None, load=0.0)}"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr.strip().rpartition("\n")[2]) == (1, "its pixels are others than Pillow's")


# ----------------------------------------------------------------------------------------- the JPEG engine


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize(
    ("asked", "device", "load"),
    [(None, 0, 1.0), (0, 0, 0.0), (1, 0, 1.0), (0.25, 0, 0.25), (None, 1, 0.0), (1, 1, 0.0), (0.25, 1, 0.0)],
)
def test_the_engine_decodes_all_it_can_where_there_is_one(source, asked, device, load):
    assert decoding_on(source, torch.device("cuda", device), "auto", asked) == Decoding(load)


@pytest.mark.parametrize(("status", "engines"), [(0, 8), (0, 0), (5, 8)], ids=["engine", "none", "old chip"])
def test_a_gpu_without_an_engine_is_named_once(monkeypatch, capsys, status, engines):
    def tell(_handle, count, _cores):
        count._obj.value = engines

    library = SimpleNamespace(
        nvjpegCreateEx=lambda *_: status, nvjpegGetHardwareDecoderInfo=tell, nvjpegDestroy=lambda _: 0
    )
    monkeypatch.setattr(hardware, "_nvjpeg", lambda: library)
    monkeypatch.setattr(torch.cuda, "device", nullcontext)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: f"GPU {index}")
    has = status == 0 and engines > 0
    assert [hardware._has_jpeg_engine(0) for _ in range(2)] == [has, has]
    words = "dalikd: GPU 0 has no JPEG engine: its cores decode (--data.hw_decoder_load 0)\n"
    assert capsys.readouterr().out == ("" if has else words)


def test_nvjpeg_is_found_and_answers_without_a_gpu():
    library = hardware._nvjpeg()
    assert library is not None
    if not torch.cuda.is_available():
        assert library.nvjpegCreateEx(
            hardware._HARDWARE, None, None, 0, hardware.ctypes.byref(hardware.ctypes.c_void_p())
        )


# ------------------------------------------------------------------------------------------------ versions


def test_installed_libraries_fit():
    hardware.check_libraries()


@pytest.mark.parametrize(
    ("built", "served", "words"),
    [
        (13000, 12040, r"driver 550\.54\.14 is too old for DALI: it serves CUDA 12\.4, .* built for CUDA 13\."),
        (12000, 13000, ""),
    ],
)
def test_a_driver_too_old_for_dali_is_named(monkeypatch, built, served, words):
    monkeypatch.setattr(backend, "__cuda_version__", built)
    monkeypatch.setattr(hardware, "_driver_cuda", lambda: served)
    monkeypatch.setattr(hardware, "driver_version", lambda: "550.54.14")
    if not words:
        return hardware.check_libraries()
    with pytest.raises(ValueError, match=words):
        hardware.check_libraries()


@pytest.mark.parametrize(
    ("installed", "loaded", "words"),
    [
        (
            "0.7.0.11",
            700,
            r"DALI .* does not work with nvidia-nvimgcodec-cu12 0\.7\.0\.11: pip install 'nvidia-nvimgcodec",
        ),
        (None, 700, r"has loaded another nvImageCodec \(version number 700\) than nvidia-nvimgcodec-cu12 "),
        (None, None, ""),
    ],
    ids=["not of this DALI", "not the installed one", "unknown"],
)
def test_a_wrong_nvimagecodec_is_named(monkeypatch, installed, loaded, words):
    real = hardware.version
    monkeypatch.setattr(
        hardware, "version", lambda name: installed if installed and name == hardware._CODEC[0] else real(name)
    )
    monkeypatch.setattr(hardware, "_loaded_codec", lambda: loaded)
    if not words:
        return hardware.check_libraries()
    with pytest.raises(ValueError, match=words):
        hardware.check_libraries()


def test_versions_name_what_is_there(monkeypatch):
    found = package_versions()
    assert found["dali"] == hardware.version(hardware._installed(hardware._DALI)[0])
    assert found["torch_cuda"] == torch.version.cuda
    assert hardware._as_number(found["nvimgcodec"]) == backend.GetNvimgcodecVersion()

    def missing(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(hardware, "version", missing)
    assert not {"dali", "nvimgcodec"} & package_versions().keys()


def test_the_driver_is_read_from_the_kernel_module(monkeypatch, tmp_path):
    file = tmp_path / "version"
    monkeypatch.setattr(hardware, "_DRIVER", Path(file))
    assert driver_version() is None
    file.write_text(
        "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release Build\nGCC version: 12\n"
    )
    assert driver_version() == "580.65.06"
