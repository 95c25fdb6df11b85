"""What torchrun starts once for each card: all of them add up, by NCCL; two processes without a card do so by Gloo."""

import os
import time
from datetime import timedelta

import torch
import torch.distributed as dist

DEADLINE_S = 120  # peer-to-peer copies that hang never end by themselves
ROUNDS = 10


def main() -> None:
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    cards = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cards else torch.device("cpu")
    if cards:
        torch.cuda.set_device(device)
    backend = "nccl" if cards else "gloo"
    dist.init_process_group(backend, timeout=timedelta(seconds=DEADLINE_S))
    elements = 2**26 if cards else 2**18
    values = torch.full((elements,), float(rank + 1), device=device)
    dist.all_reduce(values)  # also makes the connections, which the time below shall not hold
    want = size * (size + 1) / 2
    assert bool((values == want).all()), f"the sum over {size} is {values[0].item()}, and not {want}"
    values.zero_()
    if cards:
        torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(ROUNDS):
        dist.all_reduce(values)
    if cards:
        torch.cuda.synchronize()
    seconds = time.perf_counter() - began
    # What each link carries in a ring: https://github.com/NVIDIA/nccl-tests/blob/master/doc/PERFORMANCE.md
    rate = 2 * (size - 1) / size * values.nbytes * ROUNDS / seconds / 1e9
    if rank == 0:
        print(
            f"{size} {'cards by NCCL' if cards else 'processes by Gloo'}: the sum is right, {rate:.1f} GB/s"
        )
        print(f"figure all_reduce_gb_per_s {rate:.2f}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
