"""Which processor, which number format, how many threads. Asked once, by a command; never at import."""

import ctypes
import os
import platform
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch

from workload.errors import WorkloadError


def choose_device(name: str) -> torch.device:
    """ "auto" (a GPU when there is one), "cpu", "cuda" or "cuda:N"."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise WorkloadError(f"there is no device {name}", "--device is auto, cpu, cuda or cuda:N") from error
    if device.type not in ("cpu", "cuda"):
        raise WorkloadError(f"device {name} is not supported", "--device is auto, cpu, cuda or cuda:N")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise WorkloadError(
            "torch sees no CUDA device", "nvidia-smi tells whether the driver does; or --device cpu"
        )
    return device


def choose_dtype(name: str, device: torch.device, cpu_flags: frozenset[str]) -> torch.dtype:
    """The format of matrix products: "bf16", "fp32", or "auto": bf16 where the processor multiplies it itself.

    A CPU without AVX512-BF16 or AMX emulates it, about eleven times slower than fp32; so do GPUs before sm_80.
    """
    if name == "auto":
        if device.type == "cuda":
            native = torch.cuda.get_device_capability(device) >= (8, 0)
        else:
            native = not cpu_flags.isdisjoint({"avx512_bf16", "amx_bf16"})
        return torch.bfloat16 if native else torch.float32
    return {"bf16": torch.bfloat16, "fp32": torch.float32}[name]


def read_cpu_flags() -> frozenset[str]:
    """Linux's names of what the first core can do; empty elsewhere."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace")
    except OSError:
        return frozenset()
    return frozenset(next((line for line in text.splitlines() if line.startswith("flags")), "").split())


def count_cores() -> int:
    """Cores this process may use: its affinity, and a container's quota. More threads than that crawl."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        if quota != "max":
            cores = min(cores, max(1, round(int(quota) / int(period))))
    except (OSError, ValueError):
        pass
    return cores


def keep_memory() -> bool:
    """Let the C library keep what is freed for the next step; False where it has no such setting (only glibc has).

    By default glibc gives large blocks back to the kernel, which then clears every page of the next step's logits:
    measured on the demo, 200,000 page faults and half of the processor's time in each step.
    """
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallopt"):
        return False
    m_trim_threshold, m_mmap_max = -1, -4  # malloc.h
    return bool(libc.mallopt(m_mmap_max, 0) and libc.mallopt(m_trim_threshold, -1))


def autocast(device: torch.device, dtype: torch.dtype) -> AbstractContextManager[object]:
    """Matrix products in `dtype` inside; weights stay fp32."""
    return nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype=dtype)


def describe(device: torch.device, dtype: torch.dtype) -> str:
    """One line for the log and the report."""
    if device.type == "cuda":
        what = torch.cuda.get_device_name(device)
    else:
        threads = torch.get_num_threads()
        what = f"{_cpu_name()}, {threads} thread{'s' * (threads > 1)}"
    return f"{what}, {str(dtype).removeprefix('torch.')}, torch {torch.__version__}, Python {platform.python_version()}"


def _cpu_name() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace")
    except OSError:
        return platform.machine()
    lines = (line.partition(":")[2].strip() for line in text.splitlines() if line.startswith("model name"))
    return next(lines, platform.machine())
