"""The machine: which device, which precision, and the settings that keep a CPU fast."""

import ctypes
import platform
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch

from demur.errors import DemurError, unknown


def pick_device(name: str = "auto") -> torch.device:
    """The device of that name: `auto` (a GPU if there is one), `cpu`, or `cuda`.

    Raises: DemurError for another name, or for `cuda` on a machine without a usable GPU.
    """
    if name not in ("auto", "cpu", "cuda"):
        raise unknown("device", name, ("auto", "cpu", "cuda"))
    available = torch.cuda.is_available()
    if name == "cuda" and not available:
        raise DemurError("--device cuda: no CUDA GPU is usable here. Use --device cpu, or auto.")
    return torch.device("cuda" if available and name != "cpu" else "cpu")


@cache
def has_fast_bfloat16(device: torch.device) -> bool:
    """Whether bfloat16 arithmetic is in the hardware (AVX-512 BF16 or AMX on x86, BF16 on Arm, Ampere or later GPUs)."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device)[0] >= 8
    if platform.machine().lower() in ("x86_64", "amd64"):
        return bool(torch.cpu._is_avx512_bf16_supported())  # oneDNN also emulates bfloat16, slowly: ask for the instructions
    return bool(torch._C._has_mkldnn) and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


@contextmanager
def tuned() -> Iterator[None]:
    """Inside: denormal floats count as zero, big buffers stay with the process, and a GPU's float32 is float32, and repeatable.

    Adadelta's accumulators and saturated softmaxes decay into denormals, on which x86 is some hundred times slower. By
    default a GPU rounds float32 convolutions to TF32, which would decide what is reported; bfloat16 is asked for where it serves.
    """
    keep_buffers()
    was_flushing, cudnn, matmul = _flushes_denormals(), torch.backends.cudnn, torch.backends.cuda.matmul
    before = cudnn.allow_tf32, cudnn.deterministic, matmul.allow_tf32
    torch.set_flush_denormal(True)
    cudnn.allow_tf32, cudnn.deterministic, matmul.allow_tf32 = False, True, False
    try:
        yield
    finally:
        torch.set_flush_denormal(was_flushing)
        cudnn.allow_tf32, cudnn.deterministic, matmul.allow_tf32 = before


def _flushes_denormals() -> bool:
    return bool((torch.tensor([1e-39]) * torch.tensor([1.0])).item() == 0.0)


@cache
def keep_buffers() -> bool:
    """Tell glibc to keep freed buffers for the next step; says whether it was told (False where there is no glibc).

    By default each activation of more than a few megabytes is handed back to the kernel and faulted in again at every
    step, which costs more than the arithmetic on it. The price is that the process keeps its peak memory.
    """
    if sys.platform != "linux":
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    trim_threshold, top_pad, mmap_threshold = -1, -2, -3  # from malloc.h
    told = [mallopt(mmap_threshold, 1 << 30), mallopt(trim_threshold, (1 << 31) - 1), mallopt(top_pad, 1 << 26)]
    return all(told)
