"""Which device, which format, how many threads."""

import subprocess
import sys

import pytest
import torch

from workload.device import (
    choose_device,
    choose_dtype,
    count_cores,
    describe,
    find_peak,
    peak_flops,
    read_cpu_flags,
)
from workload.errors import WorkloadError

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("asked", "flags", "expected"),
    [
        ("auto", {"avx2", "avx512f"}, torch.float32),
        ("auto", {"avx512_bf16"}, torch.bfloat16),
        ("auto", {"amx_bf16", "fma"}, torch.bfloat16),
        ("bf16", set(), torch.bfloat16),
        ("fp32", {"avx512_bf16"}, torch.float32),
        ("fp16", set(), torch.float16),
    ],
)
def test_a_cpu_computes_in_bf16_only_where_it_can(asked: str, flags: set[str], expected: torch.dtype) -> None:
    assert choose_dtype(asked, CPU, frozenset(flags)) == expected


@pytest.mark.parametrize(
    ("capability", "expected"),
    [((6, 1), torch.float32), ((7, 0), torch.float16), ((7, 5), torch.float16), ((8, 0), torch.bfloat16)],
)
def test_a_gpu_computes_in_the_format_of_its_tensor_cores(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], expected: torch.dtype
) -> None:
    """The capability is a stand-in: there is no GPU here."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert choose_dtype("auto", torch.device("cuda"), frozenset()) == expected


@pytest.mark.parametrize(
    ("name", "dtype", "expected"),
    [
        ("NVIDIA GeForce RTX 3090", torch.bfloat16, 71.2e12),
        ("NVIDIA GeForce RTX 3090 Ti", torch.bfloat16, 80.0e12),
        ("NVIDIA GeForce RTX 4070 Ti SUPER", torch.float16, 88.2e12),
        ("NVIDIA A100-SXM4-80GB", torch.bfloat16, 312e12),
        ("NVIDIA H100 80GB HBM3", torch.bfloat16, 989.4e12),
        ("NVIDIA H100 PCIe", torch.bfloat16, 756e12),
        ("NVIDIA H200", torch.float32, 494.7e12),
        ("NVIDIA L4", torch.bfloat16, 121e12),
        ("NVIDIA L40S", torch.bfloat16, 362e12),
        ("Tesla T4", torch.float16, 65.1e12),
        ("Tesla T4", torch.bfloat16, None),  # it has no such unit
        ("NVIDIA GeForce RTX 4090 Laptop GPU", torch.bfloat16, None),  # another chip by that name
        ("NVIDIA A1000", torch.bfloat16, None),
        ("Some Card 9000", torch.bfloat16, None),
        ("NVIDIA H200", torch.float64, None),
    ],
)
def test_the_peak_of_a_card_is_that_of_its_own_name(
    name: str, dtype: torch.dtype, expected: float | None
) -> None:
    assert find_peak(name, dtype) == (expected and pytest.approx(expected))


def test_a_cpu_has_no_peak() -> None:
    assert peak_flops(CPU, torch.float32) is None


def test_devices_that_are_not_there_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device("auto") == choose_device("cpu") == CPU
    for name, complaint in {
        "cuda": "no CUDA device",
        "gpu": "no device gpu",
        "mps": "mps is not supported",
    }.items():
        with pytest.raises(WorkloadError, match=complaint):
            choose_device(name)


def test_the_machine_is_described() -> None:
    assert 1 <= count_cores() <= 4096
    assert "float32" in describe(CPU, torch.float32)
    assert isinstance(read_cpu_flags(), frozenset)


PAGES = """
import resource, sys, torch
from workload.device import keep_memory
if sys.argv[1] == "keep" and not keep_memory():
    sys.exit(3)
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    torch.ones(25_000_000)
before = faults()
for _ in range(5):
    torch.ones(25_000_000)  # 100 MB
print(faults() - before)
"""


def test_memory_that_is_freed_is_used_again() -> None:
    faults = {}
    for what in ("keep", "leave"):
        child = subprocess.run(
            [sys.executable, "-c", PAGES, what], capture_output=True, text=True, timeout=120, check=False
        )
        if child.returncode == 3:
            pytest.skip("not glibc")
        faults[what] = int(child.stdout)
    assert faults["keep"] < 100
    assert faults["leave"] > faults["keep"]
