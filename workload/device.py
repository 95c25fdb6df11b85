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
    """The format of matrix products: "bf16", "fp16", "fp32", or "auto": what the processor multiplies fastest itself.

    auto is bf16 on GPUs from sm_80 and on a CPU with AVX512-BF16 or AMX (others emulate it, about eleven times slower
    than fp32), fp16 on sm_70 and sm_75, whose tensor cores know nothing else, and fp32 everywhere else.
    fp16 ends at 65504 and rounds to 0 below 6e-8: training in it needs a loss scaler, sampling does not.
    """
    if name == "auto":
        if device.type != "cuda":
            native = not cpu_flags.isdisjoint({"avx512_bf16", "amx_bf16"})
            return torch.bfloat16 if native else torch.float32
        capability = torch.cuda.get_device_capability(device)
        if capability >= (8, 0):
            return torch.bfloat16
        return torch.float16 if capability >= (7, 0) else torch.float32
    return {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[name]


# TFLOP/s of dense matrix products that add up in fp32, by a part of the card's name: (bf16, fp16, fp32). fp32 is TF32
# where the card has it, because the commands allow it. NVIDIA's own figures for boost clock and the full power limit,
# sparse ones halved; those of 3090, 4090, 5090, A100, H100 and H200 were looked up a second time. The longer name is
# looked for first.
PEAK_TFLOPS: dict[str, tuple[float, float, float]] = {
    "B200": (2250.0, 2250.0, 1125.0),
    "GH200": (989.4, 989.4, 494.7),
    "H200 NVL": (835.5, 835.5, 417.7),
    "H200": (989.4, 989.4, 494.7),
    "H100 PCIe": (756.0, 756.0, 378.0),
    "H100 NVL": (835.5, 835.5, 417.7),
    "H100": (989.4, 989.4, 494.7),
    "H800": (989.4, 989.4, 494.7),
    "H20": (148.0, 148.0, 74.0),
    "A100": (312.0, 312.0, 156.0),
    "A800": (312.0, 312.0, 156.0),
    "A30": (165.0, 165.0, 82.0),
    "A40": (149.7, 149.7, 74.8),
    "A10G": (70.0, 70.0, 35.0),
    "A10": (125.0, 125.0, 62.5),
    "L40S": (362.0, 362.0, 183.0),
    "L40": (181.0, 181.0, 90.5),
    "L4": (121.0, 121.0, 60.0),
    "RTX A6000": (154.8, 154.8, 77.4),
    "RTX 6000 Ada": (364.2, 364.2, 182.1),
    "RTX 5090": (209.5, 209.5, 104.8),
    "RTX 5080": (112.6, 112.6, 56.3),
    "RTX 5070 Ti": (87.9, 87.9, 43.9),
    "RTX 5070": (61.7, 61.7, 30.9),
    "RTX 4090": (165.2, 165.2, 82.6),
    "RTX 4080 SUPER": (104.4, 104.4, 52.2),
    "RTX 4080": (97.5, 97.5, 48.7),
    "RTX 4070 Ti SUPER": (88.2, 88.2, 44.1),
    "RTX 4070 Ti": (80.2, 80.2, 40.1),
    "RTX 4070 SUPER": (71.0, 71.0, 35.5),
    "RTX 4070": (58.3, 58.3, 29.1),
    "RTX 4060 Ti": (44.1, 44.1, 22.1),
    "RTX 4060": (30.2, 30.2, 15.1),
    "RTX 3090 Ti": (80.0, 80.0, 40.0),
    "RTX 3090": (71.2, 71.2, 35.6),
    "RTX 3080 Ti": (68.2, 68.2, 34.1),
    "RTX 3080": (59.5, 59.5, 29.8),
    "RTX 3070": (40.6, 40.6, 20.3),
    "RTX 3060": (25.5, 25.5, 12.7),
    "V100": (0.0, 125.0, 15.7),
    "T4": (0.0, 65.1, 8.1),
    "TITAN RTX": (0.0, 130.5, 16.3),
    "RTX 2080 Ti": (0.0, 53.8, 13.4),
}


def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """FLOP/s that the card could do at most, in dense matrix products of `dtype`; None for a CPU or an unknown card.

    Laptop cards share names with desktop ones and do less: None as well.
    """
    if device.type != "cuda":
        return None
    return find_peak(torch.cuda.get_device_name(device), dtype)


def find_peak(name: str, dtype: torch.dtype) -> float | None:
    """`peak_flops` of the card that calls itself `name`."""
    column = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}.get(dtype)
    if column is None or "Laptop" in name or "Max-Q" in name:
        return None
    words = f" {name} ".replace("-", " ").lower()
    known = (part for part in sorted(PEAK_TFLOPS, key=len, reverse=True) if f" {part} ".lower() in words)
    part = next(known, None)
    return PEAK_TFLOPS[part][column] * 1e12 or None if part is not None else None


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
