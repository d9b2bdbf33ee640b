"""What a GPU decodes with: its driver, DALI and nvImageCodec, the chip's JPEG engine; how it is to be used; and what
DALI's errors mean.

Importing this loads neither torch nor DALI.
"""

import ctypes
import ctypes.util
import functools
import os
import re
import signal
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol

if TYPE_CHECKING:
    import torch

__all__ = [
    "LACK",
    "PLAIN",
    "BadFileError",
    "Decode",
    "Decoding",
    "Images",
    "check_libraries",
    "dali_words",
    "decoding_on",
    "driver_version",
    "is_decode_failure",
    "package_versions",
]

Decode = Literal["auto", "windows", "whole"]

_DALI = ("nvidia-dali-cuda120", "nvidia-dali-cuda130")
_CODEC = ("nvidia-nvimgcodec-cu12", "nvidia-nvimgcodec-cu13")
_WINDOWS_DOUBTED = 900  # nvImageCodec 0.9, as it writes its versions: 1000, 100 and 1 for each number
_DRIVER = Path("/proc/driver/nvidia/version")
_HARDWARE = 3  # nvJPEG's backend that is the engine
_PROBE_SECONDS = 120
#: How torch and DALI say that a GPU or the host has no memory left.
LACK = re.compile(
    r"out of memory|CUDABadAlloc|bad_alloc|ALLOC(ATOR)?_FAIL|CUDA allocation failed|[cC]an(no|')t allocate memory"
)


class Decoding(NamedTuple):
    """How a GPU decodes. On the CPU all of it is passed over.

    Attributes:
        hw_decoder_load: share of the images that the chip's JPEG engine decodes. With 0 or 1 an image's pixels do not
            depend on the others of its batch; with a share between, they do.
        whole: decode images whole and cut windows out, rather than decode windows.
    """

    hw_decoder_load: float = 0.0
    whole: bool = False

    def options(self) -> dict[str, Any]:
        """As the data options that ask for it."""
        return {"hw_decoder_load": self.hw_decoder_load, "decode": "whole" if self.whole else "windows"}


PLAIN = Decoding()


class Images(Protocol):
    """What is asked of a `Source` here: whether its images are decoded, and in memory."""

    @property
    def arrays(self) -> Any: ...


def decoding_on(
    source: Images, device: "torch.device", decode: Decode = "auto", hw_decoder_load: float | None = None
) -> Decoding:
    """How a source's images are decoded on a device: as asked for, as far as that goes. What does not go is said, once.

    Args:
        source: the images; those in memory need nothing.
        device: that decodes.
        decode: auto: windows, but whole images where nvImageCodec is 0.9 or newer and cannot decode windows.
        hw_decoder_load: default: 1 where the GPU has a JPEG engine, else 0.

    Raises:
        ValueError: DALI cannot work with this driver or this nvImageCodec.
    """
    if device.type != "cuda" or source.arrays is not None:
        return PLAIN
    import torch

    index = torch.cuda.current_device() if device.index is None else device.index
    check_libraries()
    load = 0.0
    if hw_decoder_load != 0 and _has_jpeg_engine(index):
        load = 1.0 if hw_decoder_load is None else float(hw_decoder_load)
    return Decoding(load, decode == "whole" or (decode == "auto" and not _decodes_windows(index, load)))


# -------------------------------------------------------------------------------------------------- versions


def package_versions() -> dict[str, str]:
    """Of DALI, nvImageCodec and the driver, where they are there; and the CUDA that torch is built for."""
    found = {"dali": _installed(_DALI), "nvimgcodec": _installed(_CODEC)}
    named = {name: number for name, (_, number) in found.items() if number}
    return {**named, **_named("torch_cuda", _torch_cuda()), **_named("driver", driver_version())}


def driver_version() -> str | None:
    """Of NVIDIA's kernel driver, such as 580.65.06."""
    found = re.search(r"\b\d{3}\.\d[\d.]*", _DRIVER.read_text("utf-8")) if _DRIVER.exists() else None
    return found[0] if found else None


def _named(name: str, value: str | None) -> dict[str, str]:
    return {name: value} if value else {}


def _torch_cuda() -> str | None:
    """Out of its file of versions: torch itself takes seconds to import."""
    from importlib.util import find_spec

    spec = find_spec("torch")
    file = Path(spec.origin).with_name("version.py") if spec is not None and spec.origin else None
    found = re.search(r"^cuda\b.*=\s*'([\d.]+)'", file.read_text("utf-8"), re.M) if file and file.exists() else None
    return found[1] if found else None


def _installed(packages: tuple[str, ...]) -> tuple[str, str]:
    """The first of these packages that is installed, and its version; empty strings where none is."""
    for package in packages:
        try:
            return package, version(package)
        except PackageNotFoundError:
            continue
    return "", ""


@functools.cache
def check_libraries() -> None:
    """Check that driver, DALI and nvImageCodec fit together.

    Raises:
        ValueError: they do not; it says what to install.
    """
    from nvidia.dali import backend

    dali, number = _installed(_DALI)
    built, served = backend.__cuda_version__ // 1000, _driver_cuda()  # type: ignore[attr-defined]
    if served is not None and served // 1000 < built:
        raise ValueError(
            f"the driver {driver_version() or ''} is too old for DALI: it serves CUDA {served // 1000}."
            f"{served % 1000 // 10}, and {dali or 'DALI'} {number} is built for CUDA {built}. Update the driver, "
            "install a DALI of that CUDA, or use --device cpu"
        )
    from packaging.requirements import Requirement  # DALI brings it

    needs = [Requirement(line) for line in (requires(dali) or () if dali else ())]
    for codec in (need for need in needs if need.name in _CODEC):
        installed, loaded = _installed((codec.name,))[1], _loaded_codec()
        if not installed or installed not in codec.specifier:
            found, remedy = installed or "(not installed)", f"pip install '{codec.name}{codec.specifier}'"
            raise ValueError(f"DALI {number} does not work with {codec.name} {found}: {remedy}")
        if loaded and loaded != _as_number(installed):
            raise ValueError(
                f"DALI has loaded another nvImageCodec (version number {loaded}) than {codec.name} {installed}, which "
                "is installed: take the other libnvimgcodec.so out of LD_LIBRARY_PATH"
            )


def _as_number(words: str) -> int:
    major, minor, patch = map(int, words.split(".")[:3])
    return 1000 * major + 100 * minor + patch


def _loaded_codec() -> int | None:
    """nvImageCodec's version as DALI says it: 1000, 100 and 1 for each number."""
    from nvidia.dali import backend

    number = getattr(backend, "GetNvimgcodecVersion", lambda: 0)()
    return number if number > 0 else None


def _driver_cuda() -> int | None:
    """The newest CUDA that the driver serves: 1000 for the major and 10 for the minor number."""
    found = ctypes.c_int()
    try:
        failed = ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(found))
    except OSError:
        return None
    return None if failed else found.value


# ------------------------------------------------------------------------------------------------- the chip


@functools.cache
def _has_jpeg_engine(index: int) -> bool:
    """Whether nvJPEG finds a JPEG engine on the CUDA device; says so where it does not."""
    library = _nvjpeg()
    if library is None:
        _say("libnvjpeg is not found, and without it no JPEG engine: pip install nvidia-nvjpeg-cu12")
        return False
    import torch

    handle, engines, cores = ctypes.c_void_p(), ctypes.c_uint(), ctypes.c_uint()
    with torch.cuda.device(index):
        torch.cuda.synchronize()  # the device's context is this thread's from now on
        if library.nvjpegCreateEx(_HARDWARE, None, None, 0, ctypes.byref(handle)) == 0:
            library.nvjpegGetHardwareDecoderInfo(handle, ctypes.byref(engines), ctypes.byref(cores))
            library.nvjpegDestroy(handle)
    if engines.value == 0:
        _say(f"{torch.cuda.get_device_name(index)} has no JPEG engine: its cores decode (--data.hw_decoder_load 0)")
    return engines.value > 0


def _nvjpeg() -> ctypes.CDLL | None:
    import nvidia

    found = [str(file) for root in nvidia.__path__ for file in sorted(Path(root).glob("*/lib/libnvjpeg.so.*"))]
    name = next(iter(found), ctypes.util.find_library("nvjpeg"))
    return None if name is None else ctypes.CDLL(name)


@functools.cache
def _decodes_windows(index: int, load: float) -> bool:
    """Whether the CUDA device decodes windows: older than 0.9 nvImageCodec does; of others a process of its own finds
    out, which may end by it."""
    loaded = _loaded_codec()
    if loaded is not None and loaded < _WINDOWS_DOUBTED:
        return True
    code = f"import sys; sys.path[:] = {sys.path!r}; {_PROBE.format(index=index, load=load)}"
    try:
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=_PROBE_SECONDS
        )
    except subprocess.TimeoutExpired:
        why = f"it has not done so in {_PROBE_SECONDS} seconds"
    else:
        words = done.stderr.strip().rpartition("\n")[2]
        signals = {-number: number.name for number in signal.Signals}
        why = signals.get(done.returncode, words or f"exit code {done.returncode}") if done.returncode else ""
    if why:
        _say(
            f"nvImageCodec {_installed(_CODEC)[1]} cannot decode windows of JPEGs on this GPU ({why}): images are "
            "decoded whole, which takes longer; DALI 2.2 can, and --data.decode whole leaves this test out"
        )
    return not why


_PROBE = "from dalikd.pipelines.doctor import decode_windows; decode_windows({index}, {load})"


def _say(words: str) -> None:
    """Once for all processes: accelerate and torchrun number them in RANK."""
    if os.environ.get("RANK", "0") == "0":
        print(f"dalikd: {words}", flush=True)


# ----------------------------------------------------------------------------------------------- DALI's errors


class BadFileError(ValueError):
    """An image could not be decoded, while running or when `dalikd doctor` looked at it."""


def is_decode_failure(error: RuntimeError) -> bool:
    """Whether DALI failed on what it was given, rather than for lack of memory or another fault of the GPU."""
    text = str(error)
    of_gpu = re.search(r"CUDA[ _](runtime|driver|allocation|ERROR)|cudaError", text)
    return "in pipeline" in text and of_gpu is None and LACK.search(text) is None


def dali_words(error: Exception) -> str:
    """What DALI says in one line, without the lines of its graph and of its own code."""
    text = str(error).rpartition("encountered:")[2].partition("C++ context")[0].partition("Current pipeline")[0]
    return " ".join(text.split())[:300]
