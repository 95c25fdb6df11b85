"""Products of every card, or with `cpu` of the processor, against double precision, and what torch.compile makes."""

import shutil
import sys
from collections.abc import Sequence

import torch
from torch import Tensor


def fits(capability: Sequence[int], kernels: Sequence[str]) -> bool:
    """Kernels for sm_XY run on X.Y and on what is newer of the same X; PTX (compute_XY) on all that is newer."""
    for kernel in kernels:
        kind, _, number = kernel.partition("_")
        has = divmod(int("".join(filter(str.isdigit, number))), 10)
        if has <= tuple(capability) and (kind == "compute" or has[0] == capability[0]):
            return True
    return False


def multiply(device: str, kind: torch.dtype, tolerance: float) -> None:
    """`tolerance`: as a part of the largest element."""
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(512, 512, generator=generator).to(kind) for _ in range(2))
    want = left.double() @ right.double()
    got = (left.to(device) @ right.to(device)).cpu().double()
    error = ((got - want).abs().max() / want.abs().max()).item()
    assert error < tolerance, f"{device}: a product in {kind} is wrong by {error:.2g} of its largest element"


def compile_one(device: str) -> None:
    def function(x: Tensor) -> Tensor:
        return torch.nn.functional.gelu(x) * 2 + 1

    x = torch.linspace(-3, 3, 1000, device=device)
    error = (torch.compile(function)(x) - function(x)).abs().max().item()
    assert error < 1e-4, f"{device}: what torch.compile made is wrong by {error:.2g}"


def prove_card(device: str, name: str, capability: Sequence[int], kernels: Sequence[str]) -> str:
    sm = f"sm_{capability[0]}{capability[1]}"
    assert fits(capability, kernels), (
        f"{name} is {sm}, and torch {torch.__version__} has no kernels for it, only for {kernels}"
    )
    # bfloat16 is native from there on
    half = torch.bfloat16 if tuple(capability) >= (8, 0) else torch.float16
    multiply(device, torch.float32, 1e-4)
    multiply(device, half, 2e-2)
    if tuple(capability) >= (7, 0):  # Triton knows nothing older
        compile_one(device)
        return f"{name} ({sm}): float32, {half}, torch.compile"
    return f"{name} ({sm}): float32, {half}"


def prove_processor() -> str:
    """On a processor nothing of the workload needs torch.compile: without a compiler it is left out, and said so."""
    multiply("cpu", torch.float32, 1e-4)
    multiply("cpu", torch.bfloat16, 2e-2)
    compiler = shutil.which("g++") or shutil.which("c++")
    if compiler:
        compile_one("cpu")
    compiled = "torch.compile" if compiler else "torch.compile not tried, for there is no C++ compiler"
    return f"{torch.get_num_threads()} threads: float32, bfloat16, {compiled}"


def main(kind: str) -> None:
    if kind == "cpu":
        print(prove_processor())
        return
    torch.cuda.init()  # type: ignore[no-untyped-call]  # raises with the reason, where is_available() only says no
    for index in range(torch.cuda.device_count()):
        device, name = f"cuda:{index}", torch.cuda.get_device_name(index)
        capability = torch.cuda.get_device_capability(index)
        print(prove_card(device, name, capability, torch.cuda.get_arch_list()))


if __name__ == "__main__":
    main("".join(sys.argv[1:]))
