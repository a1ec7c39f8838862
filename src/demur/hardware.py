"""The machine: device, precision, and settings that keep computations fast and repeatable."""

import ctypes
import platform
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache

import torch

from demur.errors import DemurError, unknown


def pick_device(name: str = "auto") -> torch.device:
    """Choose the device to compute on.

    Parameters
    ----------
    name : {"auto", "cpu", "cuda"}
        ``"auto"`` takes a GPU if the machine has a usable one, else the CPU.

    Returns
    -------
    torch.device
        The device.

    Raises
    ------
    DemurError
        For another name, or for ``"cuda"`` on a machine without a usable GPU.

    Examples
    --------
    >>> pick_device("cpu")
    device(type='cpu')
    """
    if name not in ("auto", "cpu", "cuda"):
        raise unknown("device", name, ("auto", "cpu", "cuda"))
    available = torch.cuda.is_available()
    if name == "cuda" and not available:
        raise DemurError("device cuda: no CUDA GPU is usable here. Use --device cpu or auto.")
    return torch.device("cuda" if available and name != "cpu" else "cpu")


@cache
def has_fast_bfloat16(device: torch.device) -> bool:
    """Return whether the hardware has bfloat16 arithmetic.

    Parameters
    ----------
    device : torch.device
        A CPU or a CUDA GPU.

    Returns
    -------
    bool
        True on x86 with AVX-512 BF16 or AMX, on Arm with BF16, and on GPUs of the Ampere
        generation or later. False where torch cannot tell.

    Examples
    --------
    >>> has_fast_bfloat16(torch.device("cpu")) in (False, True)
    True
    """
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device)[0] >= 8
    return _cpu_has_bfloat16()


def _cpu_has_bfloat16() -> bool:
    """Ask private functions of torch (D39); False where torch does not have them."""
    try:
        if platform.machine().lower() in ("x86_64", "amd64"):
            # oneDNN also emulates bfloat16, slowly: ask for the instructions.
            return bool(torch.cpu._is_avx512_bf16_supported())
        return bool(torch._C._has_mkldnn) and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    except (AttributeError, RuntimeError, TypeError):
        return False


def changes_of(tensor: torch.Tensor) -> int | None:
    """Count how often a tensor was changed in place.

    This file alone uses private attributes of torch, and none of them must exist (D39).

    Parameters
    ----------
    tensor : Tensor

    Returns
    -------
    int or None
        None where torch does not count: in tensors of inference mode, and in versions of torch
        without the attribute.

    Examples
    --------
    >>> ones = torch.ones(2)
    >>> before = changes_of(ones)
    >>> _ = ones.mul_(2)
    >>> before is None or changes_of(ones) > before
    True
    """
    try:
        return int(tensor._version)
    except (AttributeError, RuntimeError, TypeError):
        return None


@contextmanager
def tuned() -> Iterator[None]:
    """Set torch up for fast and repeatable float32 inside the block, and restore it afterwards.

    Denormal floats count as zero: accumulators of Adadelta and saturated softmaxes decay into
    denormals, and x86 processes these about a hundred times slower. A GPU computes float32
    convolutions in float32 and by deterministic algorithms: by default it rounds them to TF32, and
    this rounding would decide what is reported. The memory allocator is not touched: see
    `keep_buffers`.

    Examples
    --------
    >>> with tuned():
    ...     float(torch.tensor([1e-39]) * torch.tensor([1.0]))
    0.0
    """
    cudnn = torch.backends.cudnn
    matmul = torch.backends.cuda.matmul
    was_flushing = _flushes_denormals()
    before = cudnn.allow_tf32, cudnn.deterministic, matmul.allow_tf32
    torch.set_flush_denormal(True)
    cudnn.allow_tf32 = False
    cudnn.deterministic = True
    matmul.allow_tf32 = False
    try:
        yield
    finally:
        torch.set_flush_denormal(was_flushing)
        cudnn.allow_tf32, cudnn.deterministic, matmul.allow_tf32 = before


def _flushes_denormals() -> bool:
    return bool((torch.tensor([1e-39]) * torch.tensor([1.0])).item() == 0.0)


@cache
def keep_buffers() -> bool:
    """Tell the C library (glibc) to keep freed buffers for later use.

    By default glibc returns each activation of more than a few megabytes to the kernel and faults
    it in again at every step, which costs more than the arithmetic on it. The price is that the
    process keeps its peak memory. The setting holds for the whole process, so only commands and
    benchmarks call this function; the library never does (D37).

    Returns
    -------
    bool
        Whether glibc accepted the settings; False where there is no glibc.

    Examples
    --------
    >>> keep_buffers() in (False, True)  # doctest: +SKIP
    True
    """
    if sys.platform != "linux":
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    # Numbers of the parameters, from malloc.h.
    trim_threshold = -1
    top_pad = -2
    mmap_threshold = -3
    told = [
        mallopt(mmap_threshold, 1 << 30),
        mallopt(trim_threshold, (1 << 31) - 1),
        mallopt(top_pad, 1 << 26),
    ]
    return all(told)


def release_buffers() -> None:
    """Give freed memory back to the kernel, where the C library is glibc.

    Tasks of different sizes leave holes between what is still in use. Without this call the memory
    of a long run grows with the number of its tasks. It changes no setting.

    Examples
    --------
    >>> release_buffers()
    """
    if sys.platform == "linux":
        with suppress(OSError, AttributeError):
            ctypes.CDLL(None).malloc_trim(0)
