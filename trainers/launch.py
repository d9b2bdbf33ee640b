"""Start of every command: device, precision and processes, checked before any work."""

import ctypes
import os
import shlex
import shutil
import sys
from functools import cache
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Literal

import torch
import torch.distributed.nn.functional  # before there is a group: its defaults would keep one to the end
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.state import AcceleratorState
from accelerate.utils import KwargsHandler
from torch import distributed
from torch.distributed import PrefixStore, TCPStore  # pyright: ignore[reportPrivateImportUsage]

from dalikd.trainers.stopping import Watch

__all__ = [
    "CompileMode",
    "Device",
    "Precision",
    "autocast_type",
    "automatic_mode",
    "check_compiler",
    "leave",
    "model_type",
    "start",
]

Device = Literal["auto", "cpu", "cuda"]
CompileMode = Literal["auto", "off", "default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"]
Precision = Literal["fp32", "tf32", "bf16", "fp16", "fp64"]

_MIXED = {"bf16": torch.bfloat16, "fp16": torch.float16}
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of mallopt, in malloc.h


def start(device: Device, precision: Precision) -> Accelerator:
    """Join the processes that a launcher started, or stand alone, on the device asked for.

    Raises:
        ValueError: there is no such device, the driver is too old, or Accelerate's environment says otherwise.
    """
    _check_environment(device, precision)
    use_cpu = device == "cpu" or not torch.cuda.is_available()
    if precision == "fp16" and use_cpu:
        raise ValueError("--precision fp16 needs a GPU: use bf16 or fp32 on the CPU")
    if use_cpu:
        _keep_freed_memory()
    torch.backends.cudnn.benchmark = not use_cpu  # the shapes stay the same: a search for the fastest kernels pays
    if precision in ("fp32", "tf32"):
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = precision == "tf32"
    _join_again("gloo" if use_cpu else "nccl")
    AcceleratorState._reset_state()  # a second command of one process may ask for another precision
    mixed = precision if precision in _MIXED else "no"
    handlers: list[KwargsHandler] = [DistributedDataParallelKwargs(gradient_as_bucket_view=True)]
    accelerator = Accelerator(cpu=use_cpu, mixed_precision=mixed, kwargs_handlers=handlers)
    Watch.begin(accelerator)
    return accelerator


def _join_again(backend: str) -> None:
    """Where torchrun has started the processes once more, let them meet under names of their own.

    Its store keeps what those before have written, and torch would take addresses of processes that are gone for those
    of the new ones, and wait for half an hour (PyTorch issue 135712).
    """
    rank, processes = (int(os.environ.get(name, "-1")) for name in ("RANK", "WORLD_SIZE"))
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True" or rank < 0 or distributed.is_initialized():
        return  # without a rank it is a process that one of torchrun's has started for itself
    count = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    if os.environ.get("GROUP_WORLD_SIZE", "1") != "1":  # each node's launcher counts for itself
        if os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0") != "0" and rank == 0:
            print(
                "dalikd: torchrun --max_restarts on several nodes: processes that are started again may wait for ever "
                "for those before; export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 on every node",
                file=sys.stderr,
            )
    elif count != "0":
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        store = PrefixStore(f"start {count}", TCPStore(address, port, processes, is_master=False))
        distributed.init_process_group(backend, store=store, rank=rank, world_size=processes)


def leave() -> None:
    """Part from the other processes, once all is done, while the interpreter still lives: a thread of gloo that
    outlives it, and frees its last tensor then, ends the process with signal 6, for a launcher a failure."""
    if distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()


def autocast_type(precision: Precision) -> torch.dtype | None:
    """The compute type of mixed precision, or None."""
    return _MIXED.get(precision)


def model_type(precision: Precision) -> torch.dtype:
    """The type parameters are kept in."""
    return torch.float64 if precision == "fp64" else torch.float32


@cache  # which says once what is missing
def automatic_mode(on_cpu: bool) -> CompileMode:
    """What `auto` means: the default mode on a GPU where something can compile for it, else off.

    Args:
        on_cpu: whether the CPU is asked for, even beside a GPU.
    """
    if on_cpu or not torch.cuda.is_available():
        return "off"
    tools = {"triton": find_spec("triton"), "a C compiler": _finds_compiler()}
    missing = [name for name, found in tools.items() if not found]
    if missing and os.environ.get("RANK", "0") == "0":
        print(
            f"dalikd: --compile auto compiles nothing, for lack of {' and '.join(missing)}: a run takes longer "
            "(install gcc, or triton beside torch)",
            file=sys.stderr,
        )
    return "off" if missing else "default"


def check_compiler(mode: CompileMode) -> None:
    """Refuse to compile where nothing can: torch turns every region into C++, or into kernels with a stub in C.

    Raises:
        ValueError: no compiler is installed.
    """
    if mode != "off" and not _finds_compiler():
        raise ValueError(f"--compile {mode} needs a C++ compiler and there is none: install g++, or use --compile off")


def _finds_compiler() -> bool:
    named = [os.environ[variable] for variable in ("CXX", "CC") if os.environ.get(variable)]
    return any(shutil.which(name) for name in (*named, "g++", "gcc", "clang++", "clang"))


def _keep_freed_memory() -> None:
    """Let glibc keep what is freed. Batches and activations come and go by the hundred megabytes; given back to the
    system each time, every page of them costs a fault when it comes again."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None and not os.environ.keys() & {"MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_"}:
        mallopt(_MMAP_THRESHOLD, 1 << 30)
        mallopt(_TRIM_THRESHOLD, 1 << 30)


def _check_environment(device: Device, precision: Precision) -> None:
    _check_launcher()
    if not torch.cuda.is_available() and device != "cpu":
        if Path("/dev/nvidia0").exists():
            raise ValueError(_hidden_gpu())
        if device == "cuda":
            raise ValueError("--device cuda: this machine has no CUDA device; use --device cpu")
    _check_count(device)
    if device == "cuda" and os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes"):
        raise ValueError("--device cuda, but ACCELERATE_USE_CPU is set: unset it or use --device cpu")
    launched = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")  # the launcher's default is "no"
    if launched not in ("no", precision):
        raise ValueError(
            f"--precision {precision}, but ACCELERATE_MIXED_PRECISION is {launched}: leave one of them out"
        )


def _check_count(device: Device) -> None:
    asked, there = int(os.environ.get("LOCAL_WORLD_SIZE", "1")), torch.cuda.device_count()
    on_cpu = os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes")
    if device != "cpu" and not on_cpu and torch.cuda.is_available() and asked > there:
        raise ValueError(
            f"{asked} processes were started on this machine and torch sees {there} GPU(s), one for each process: "
            f"start as many, such as torchrun --nproc_per_node {there}, or use --device cpu"
        )


def _check_launcher() -> None:
    """On the CPU `accelerate launch` starts one process, however many are asked for; then it names an address to meet
    at, and no number of processes."""
    asked_for_cpu = os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes")
    counted = {"WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE"} & os.environ.keys()
    if not asked_for_cpu or "MASTER_PORT" not in os.environ or counted:
        return
    import psutil

    try:
        launcher = psutil.Process().parent()
        words = launcher.cmdline() if launcher is not None else []
    except psutil.Error:
        words = []
    if not any("accelerate" in word for word in words):  # a job's own variables
        return
    given = [after for word, after in pairwise(words) if word.replace("-", "_") == "__num_processes"]
    given += [word.partition("=")[2] for word in words if word.replace("-", "_").startswith("__num_processes=")]
    if given[-1:] == ["1"]:  # the address is another program's
        return
    module = getattr(sys.modules["__main__"], "__spec__", None)
    program = f"-m {module.name}" if module is not None else sys.argv[0]
    raise ValueError(
        "accelerate launch starts one process on the CPU, and several were asked for: torchrun starts them, "
        f"torchrun --nproc_per_node {given[-1] if given else 'NUMBER'} {program} {shlex.join(sys.argv[1:])}"
    )


def _hidden_gpu() -> str:
    version = Path("/proc/driver/nvidia/version")
    driver = version.read_text(encoding="utf-8").splitlines()[0].strip() if version.exists() else "unknown"
    try:
        torch.cuda.init()
        reason = "no GPU is visible"
    except (RuntimeError, AssertionError) as error:  # such as: The NVIDIA driver on your system is too old (found ...)
        reason = str(error).partition(". ")[0]
    if (visible := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        reason += f"; CUDA_VISIBLE_DEVICES is {visible!r}"
    return (
        f"this machine has a GPU (/dev/nvidia0) that torch {torch.__version__} (CUDA {torch.version.cuda}) cannot see "
        f"({reason}); driver: {driver}. Update the driver, install a torch built for it, or use --device cpu"
    )
