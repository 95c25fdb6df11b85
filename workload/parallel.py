"""Several processes that train one model: DDP or FSDP2, in the environment that torchrun gives to each of them.

    RANK LOCAL_RANK WORLD_SIZE MASTER_ADDR MASTER_PORT      →  World, joined by NCCL between GPUs and gloo between CPUs

ddp     every process holds the whole model; gradients are averaged while the backward pass still runs
fsdp    every process holds a part of each weight, gradient and moment (FSDP2), for models that fit no single GPU

A step's sequences are cut into equal shares, one a rank (data.share), and gradients are averaged, so the number of
processes changes a run by rounding only. Rank 0 alone writes. What ranks must decide alike (to stop, to plan fewer
steps) they decide together, over gloo between their CPUs: it does not wait for a GPU, and it notices at once when a
rank is gone.
"""

import hashlib
import socket
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from workload.checkpoint import Checkpoint
from workload.config import TrainConfig
from workload.data import list_token_files, share
from workload.device import count_cores
from workload.errors import WorkloadError
from workload.files import hash_file
from workload.launch import OthersLost
from workload.model import GPT2
from workload.shards import load_shards

KINDS = ("ddp", "fsdp")
TIMEOUT_S = 600  # a rank that is silent for longer is taken for lost
Value = TypeVar("Value")
Loss = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class World:
    """The processes of a run, seen from one of them."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0  # on this machine: the number of its GPU
    kind: str = ""  # "ddp", "fsdp", or "" for a process that is alone
    machines: int = 1

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def any(self, flag: bool) -> bool:
        """Whether it is true on any rank. All ranks must ask, and get the same answer."""
        if not self.kind:
            return flag
        flags = torch.tensor([flag], dtype=torch.int32)
        dist.all_reduce(flags, dist.ReduceOp.MAX)
        return bool(flags)

    def first(self, value: Value) -> Value:
        """Rank 0's `value`, on every rank."""
        if not self.kind:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, device=torch.device("cpu"))
        return box[0]

    def agree(self, *values: float) -> tuple[float, ...]:
        """Rank 0's numbers, on every rank: what decisions rest on must not differ in the last bit."""
        if not self.kind:
            return values
        numbers = torch.tensor(values, dtype=torch.float64)
        dist.broadcast(numbers, src=0)
        return tuple(numbers.tolist())

    def mean(self, value: Tensor) -> Tensor:
        """Mean over the ranks, in place."""
        if self.kind:
            dist.all_reduce(value)
            value /= self.size
        return value

    def in_turn(self, work: Callable[[], Value]) -> Value:
        """What `work` gives, done by rank 0 before the others begin and by one process of a machine before its others.

        For work that leaves files which the next one finds, on one disk or on one a machine. It may take as long as the
        timeout of the group.
        """
        for turn in ("first", "first here", "all"):
            mine = self.is_first if turn == "first" else self.local_rank == 0 and not self.is_first
            if turn != "all" and mine:
                work()
            self.any(False)
        return work()


ALONE = World()


def check(train: TrainConfig, world: World, dtype: torch.dtype) -> None:
    """Refuse what these processes cannot do together."""
    share(0, train.batch, world.rank, world.size)
    if world.kind == "fsdp" and train.optimizer == "muon":
        raise WorkloadError(
            "train.optimizer = muon needs whole matrices, which no rank has with --parallel fsdp",
            "--set train.optimizer=adamw, or --parallel ddp",
        )
    if world.kind == "fsdp" and dtype == torch.float16:
        raise WorkloadError("fp16 is not trained with --parallel fsdp", "--dtype bf16, or --parallel ddp")


def read_world(environ: Mapping[str, str], kind: str = "") -> World:
    """What torchrun says to a process. kind: as asked for, or "" for ddp."""
    rank, size, local = (int(environ.get(name, "0")) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    if size == 1 and not kind:
        return ALONE
    machines = int(environ.get("GROUP_WORLD_SIZE", "1"))
    return World(rank=rank, size=size, local_rank=local, kind=kind or "ddp", machines=machines)


@contextmanager
def joined(world: World, device: torch.device, timeout_s: float = TIMEOUT_S) -> Iterator[None]:
    """The process group inside. A rank that is lost is one readable WorkloadError on all others."""
    if not world.kind:
        yield
        return
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    if device.type == "cuda":
        torch.cuda.set_device(device)
    try:
        dist.init_process_group(backend, timeout=timedelta(seconds=timeout_s))
        yield
        dist.destroy_process_group()  # after an error that could wait for a rank that is gone
    except RuntimeError as error:
        if not _is_lost(error):
            raise
        where = " or in the log of its machine" if world.machines > 1 else ""
        raise OthersLost(
            f"rank {world.rank} of {world.size} lost the others: {str(error).splitlines()[0]}",
            f"the error of the rank that ended first is above{where}; the same command with --resume goes on from the "
            "last checkpoint",
        ) from error


def _is_lost(error: RuntimeError) -> bool:
    """Whether torch.distributed speaks: gloo raises a plain RuntimeError that names its source file."""
    return isinstance(error, dist.DistError) or "gloo/" in str(error) or "gloo::" in str(error)


class _LossOf(nn.Module):
    """A model's loss as a forward pass, which is what DDP hangs its work on."""

    def __init__(self, model: GPT2, loss: Loss) -> None:
        super().__init__()
        self.model, self._loss = model, loss

    def forward(self, ids: Tensor, targets: Tensor) -> Tensor:
        return self._loss(ids, targets)


@dataclass(frozen=True)
class Wrapped:
    """How a step computes its loss so that gradients come out as their mean over the ranks."""

    loss: Loss
    accumulate: Callable[
        [], AbstractContextManager[Any]
    ]  # around forward and backward of all but the last part


def wrap(model: GPT2, world: World, loss: Loss | None = None) -> Wrapped:
    """`model` made ready for `world`: for fsdp its parameters become sharded, so make optimizers after it.

    loss: what to call instead of model.loss, such as its compiled form. Every forward pass of a training step must be
    the returned one. Under fsdp gradients are shared out after every part of a step, which needs least memory.
    """
    loss = loss or model.loss
    if world.kind == "ddp":
        device = model.wte.weight.device
        ddp = nn.parallel.DistributedDataParallel(
            _LossOf(model, loss),
            device_ids=[device.index] if device.type == "cuda" else None,
            gradient_as_bucket_view=True,
        )
        return Wrapped(ddp, ddp.no_sync)
    if world.kind == "fsdp":
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

        mesh = init_device_mesh(model.wte.weight.device.type, (world.size,))
        for block in model.h:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
        register_fsdp_forward_method(model, "loss")
        return Wrapped(model.loss, nullcontext)
    return Wrapped(loss, nullcontext)


@contextmanager
def whole(model: GPT2) -> Iterator[None]:
    """Inside, parts of a sharded model can be called one by one, by all ranks alike, as sampling does."""
    from torch.distributed.fsdp import FSDPModule

    if not isinstance(model, FSDPModule):
        yield
        return
    model.unshard()  # embeddings, last norm and head; a block gathers itself when it is called
    try:
        yield
    finally:
        model.reshard()


def gather_tensors(tensors: Mapping[str, Tensor], world: World) -> dict[str, Tensor]:
    """Whole tensors on rank 0, from whatever each rank holds of them; nothing on the others. All ranks must call it."""
    if world.kind != "fsdp":
        return dict(tensors) if world.is_first else {}
    gathered = {}
    for name, tensor in tensors.items():
        full = _full(tensor)
        if world.is_first:
            gathered[name] = full.to("cpu")  # one at a time: a GPU need not hold all of them
    return gathered


def shard_like(full: Tensor, parameter: Tensor) -> Tensor:
    """This rank's part of `full`, held as `parameter` is; `full` itself when that is not sharded."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    if not isinstance(parameter, DTensor) or isinstance(full, DTensor):
        return full
    return distribute_tensor(
        full.to(parameter.device), parameter.device_mesh, parameter.placements, src_data_rank=None
    )


def load_weights(model: GPT2, weights: Mapping[str, Tensor]) -> None:
    """Whole weights into a model that may be sharded."""
    own = model.state_dict()
    model.load_state_dict(
        {name: shard_like(t, own[name]) if name in own else t for name, t in weights.items()}
    )


def shard_optimizer(optimizer: torch.optim.Optimizer) -> None:
    """Moments that were restored whole become sharded like their parameters."""
    for parameter, state in optimizer.state.items():
        for key, value in state.items():
            if isinstance(value, Tensor) and value.shape == parameter.shape:
                state[key] = shard_like(value, parameter)


def _full(tensor: Tensor) -> Tensor:
    from torch.distributed.tensor import DTensor

    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def full_norm(norm: Tensor) -> Tensor:
    """The number that `clip_grad_norm_` returned, whole."""
    return _full(norm)


def send_checkpoint(saved: Checkpoint | None, world: World) -> Checkpoint | None:
    """Rank 0's checkpoint on every rank: no other needs to see its disk."""
    if not world.kind:
        return saved
    about = world.first((saved.config, saved.state) if saved is not None else None)
    if about is None:
        return None
    groups = (saved.model, saved.optimizer, saved.random) if saved is not None else (None, None, None)
    model, optimizer, random = (send_tensors(group, world) for group in groups)
    config, state = about
    return Checkpoint(config, state, model, optimizer, random)


def send_tensors(tensors: Mapping[str, Tensor] | None, world: World) -> dict[str, Tensor]:
    """Rank 0's tensors, on the CPU of every rank; other ranks give None."""
    if not world.kind:
        return dict(tensors or {})
    shapes = world.first({name: (t.shape, t.dtype) for name, t in (tensors or {}).items()})
    sent = {}
    for name, (shape, dtype) in shapes.items():
        tensor = tensors[name].to("cpu").contiguous() if tensors else torch.empty(shape, dtype=dtype)
        dist.broadcast(tensor, src=0)
        sent[name] = tensor
    return sent


def gather_random(states: Mapping[str, Tensor], world: World) -> dict[str, Tensor]:
    """Every rank's generators on rank 0: ``cpu``, ``cuda`` are its own, ``cpu/1`` … those of the others."""
    if not world.kind:
        return dict(states)
    boxes: list[Any] = [None] * world.size
    dist.gather_object(dict(states), boxes if world.is_first else None, group=None)
    if not world.is_first:
        return {}
    return {
        (f"{key}/{rank}" if rank else key): tensor
        for rank, box in enumerate(boxes)
        for key, tensor in box.items()
    }


def own_random(states: Mapping[str, Tensor], world: World) -> dict[str, Tensor]:
    """This rank's generators out of what `gather_random` gave; empty when there were fewer ranks then."""
    end = f"/{world.rank}" if world.rank else ""
    return {
        key.partition("/")[0]: tensor
        for key, tensor in states.items()
        if key.partition("/")[1] + key.partition("/")[2] == end
    }


def seed_rank(seed: int, step: int, world: World) -> None:
    """Draws of their own for ranks other than 0, whose dropout must not repeat that of rank 0."""
    if world.rank:
        torch.manual_seed((seed * 1_000_003 + step) * 4096 + world.rank)


def demand_same(world: World, mine: Mapping[str, str]) -> None:
    """Raise one WorkloadError on all ranks where a machine has another `mine` (what it is → its value) than rank 0."""
    if world.machines == 1:
        return
    of = [(socket.gethostname(), dict(mine))] * world.size
    dist.all_gather_object(of, of[0])
    first, wanted = of[0]
    wrong = {
        f"{what} {mine[what]} on {name}, {wanted[what]} on {first}"
        for name, mine in of
        for what in wanted
        if mine[what] != wanted[what]
    }
    if wrong:
        raise WorkloadError(
            "the machines of this run differ: " + "; ".join(sorted(wrong)),
            "give them the same data and the same environment",
        )


def name_tokens(folder: Path) -> str:
    """Twelve hex digits that differ when a token does. What meta.json says is believed; other files are read."""
    listed = load_shards(folder)
    digest = hashlib.sha256()
    for paths in list_token_files(folder).values():
        for path in paths:
            known = listed.get(path.name)
            digest.update(f"{path.name} {known.sha256 if known else hash_file(path)}\n".encode())
    return digest.hexdigest()[:12]


def local_device(name: str, world: World) -> str:
    """--device for this rank: a GPU of its own, when `name` leaves that open."""
    if name in ("auto", "cuda") and torch.cuda.is_available():
        return f"cuda:{world.local_rank}"
    return name


def local_threads(environ: Mapping[str, str]) -> int:
    """Threads of a rank that shares the cores of its machine with others."""
    return max(1, count_cores() // int(environ.get("LOCAL_WORLD_SIZE", "1")))


def describe(world: World) -> str:
    """ "2 processes, ddp", "8 processes on 2 machines, fsdp"; "" for one alone."""
    where = f" on {world.machines} machines" if world.machines > 1 else ""
    return f"{world.size} processes{where}, {world.kind}" if world.kind else ""
