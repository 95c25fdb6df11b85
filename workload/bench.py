"""How fast a model trains and samples on this device, by real steps on random tokens; nothing is written."""

import math
import resource
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from workload.compile import compile_loss
from workload.config import Config
from workload.device import autocast, describe, peak_flops
from workload.errors import WorkloadError
from workload.faults import is_out_of_memory
from workload.generate import generate
from workload.microbatch import bounded, reset_peak
from workload.model import GPT2, count_parameters, estimate_flops
from workload.optim import make_optimizer

WARM_STEPS = 3  # not counted: allocation, autotuning, compiling
GPU_TOKENS = 16384  # of a micro-batch where the configuration leaves its size open


@dataclass(frozen=True)
class Spread:
    """Seconds of several runs."""

    median_s: float
    low_s: float
    high_s: float


@dataclass(frozen=True)
class Result:
    """What was measured. Rates are of the median; phases are timed one by one, so they add up to more than a step."""

    environment: str
    parameters: int
    micro_batch: int  # sequences
    n_ctx: int  # tokens a sequence
    compiled: bool  # whether the step's loss was
    forward: Spread
    backward: Spread
    update: Spread  # clipping, the optimizer and clearing gradients
    step: Spread  # all three, waiting for the device only at the end
    tokens_per_s: float
    flops_per_s: float
    mfu: float | None  # of the device's peak; None where that is not known
    peak_memory_bytes: int  # of the device; on a CPU of this process, Python and torch included
    graphs_after_warm_up: int  # compiled while it was measured: 0 is as it should be
    sample_prompt_tokens: int
    sample_first_s: float  # to the first token after the prompt
    sample_tokens_per_s: float  # of the tokens after it


def run_bench(
    config: Config,
    *,
    device: torch.device,
    dtype: torch.dtype,
    compile_mode: str,
    steps: int,
    sample_tokens: int,
    note: Callable[[str], None],
    clock: Callable[[], float] = time.perf_counter,
) -> Result:
    """Train `steps` micro-batches and sample once; raises WorkloadError when the memory is too small."""
    model_config = config.model
    torch.manual_seed(config.train.seed)
    size = config.train.micro_batch or (
        bounded(config.train.batch, model_config.n_ctx)
        if device.type == "cpu"
        else max(1, GPU_TOKENS // model_config.n_ctx)
    )
    try:
        model = GPT2(model_config).to(device)
        trainer = _Trainer(model, config, size, device, dtype, compile_mode, note)
        reset_peak(device)
        for _ in range(WARM_STEPS):
            trainer.step(clock)
        graphs = _count_graphs()
        whole, phases = [], []
        for _ in range(steps):  # in turns, so that what disturbs the machine disturbs both
            phases.append(trainer.step(clock, wait=True))
            whole.append(sum(trainer.step(clock)))
        graphs = _count_graphs() - graphs
        peak = _peak_memory(device)
        compiled = trainer.compiled
        del trainer
        first_s, rate = _sample(model, device, dtype, sample_tokens, clock)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise WorkloadError(
            f"{size} sequences of {model_config.n_ctx} tokens do not fit the memory of {device}",
            "--set micro_batch=N with a smaller N",
        ) from error
    step = _spread(whole)
    tokens_per_s = size * model_config.n_ctx / step.median_s
    flops = tokens_per_s * estimate_flops(model_config)
    most = peak_flops(device, dtype)
    forward, backward, update = (_spread(list(times)) for times in zip(*phases, strict=True))
    return Result(
        environment=describe(device, dtype),
        parameters=count_parameters(model),
        micro_batch=size,
        n_ctx=model_config.n_ctx,
        compiled=compiled,
        forward=forward,
        backward=backward,
        update=update,
        step=step,
        tokens_per_s=tokens_per_s,
        flops_per_s=flops,
        mfu=None if most is None else flops / most,
        peak_memory_bytes=peak,
        graphs_after_warm_up=graphs,
        sample_prompt_tokens=_prompt_length(model),
        sample_first_s=first_s,
        sample_tokens_per_s=rate,
    )


class _Trainer:
    """A model, its optimizer and one batch of random tokens, which is as much work as any."""

    def __init__(
        self,
        model: GPT2,
        config: Config,
        size: int,
        device: torch.device,
        dtype: torch.dtype,
        compile_mode: str,
        note: Callable[[str], None],
    ) -> None:
        self._failed = False

        def tell(text: str) -> None:
            self._failed = True
            note(text)

        self.model = model.train()
        self.loss = compile_loss(model.loss, compile_mode, device, tell)
        self.optimizer = make_optimizer(model, config.train)
        self.scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
        self.clip = config.train.clip or math.inf
        self.device, self.dtype = device, dtype
        self.ids: Tensor = torch.randint(
            config.model.vocab_size, (size, config.model.n_ctx + 1), device=device
        )

    @property
    def compiled(self) -> bool:
        return self.loss != self.model.loss and not self._failed

    def step(self, clock: Callable[[], float], *, wait: bool = False) -> tuple[float, float, float]:
        """Seconds of forward, backward and update; without `wait` only their sum means something."""
        marks = [self._now(clock, wait=True)]
        with autocast(self.device, self.dtype):
            loss = self.loss(self.ids[:, :-1], self.ids[:, 1:])
        marks.append(self._now(clock, wait))
        self.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
        marks.append(self._now(clock, wait))
        for part in self.optimizer.parts:
            self.scaler.unscale_(part)
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.clip)
        self.optimizer.step()
        self.scaler.update()
        self.optimizer.zero_grad()
        marks.append(self._now(clock, wait=True))
        return marks[1] - marks[0], marks[2] - marks[1], marks[3] - marks[2]

    def _now(self, clock: Callable[[], float], wait: bool) -> float:
        if wait and self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return clock()


def _prompt_length(model: GPT2) -> int:
    return min(64, max(1, model.config.n_ctx // 2))


def _sample(
    model: GPT2, device: torch.device, dtype: torch.dtype, count: int, clock: Callable[[], float]
) -> tuple[float, float]:
    """(seconds to the first token, tokens/s after it), the second time."""
    first = begun = ended = 0.0
    for _ in range(2):
        begun = clock()
        tokens = generate(
            model,
            [0] * _prompt_length(model),
            count,
            n_vocab=model.config.vocab_size,
            seed=1,
            dtype=dtype,
        )
        next(tokens)  # each is on the CPU when it comes
        first = clock()
        rest = sum(1 for _ in tokens)
        ended = clock()
    return first - begun, rest / (ended - first)


def _spread(times: list[float]) -> Spread:
    return Spread(statistics.median(times), min(times), max(times))


def _count_graphs() -> int:
    from torch._dynamo.utils import counters

    return int(counters["stats"]["unique_graphs"])


def _peak_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def render_result(result: Result) -> str:
    """Lines for a person."""

    def milliseconds(spread: Spread) -> str:
        return f"{spread.median_s * 1e3:10.1f} ms  ({spread.low_s * 1e3:.1f} to {spread.high_s * 1e3:.1f})"

    mfu = "the peak of this device is not known" if result.mfu is None else f"{result.mfu:.1%} of the peak"
    compiled = "compiled" if result.compiled else "not compiled"
    lines = [
        f"machine  {result.environment}",
        f"model    {result.parameters:,} parameters; {result.micro_batch} sequences of {result.n_ctx} tokens, {compiled}",
        f"forward  {milliseconds(result.forward)}",
        f"backward {milliseconds(result.backward)}",
        f"update   {milliseconds(result.update)}",
        f"step     {milliseconds(result.step)}",
        f"train    {result.tokens_per_s:,.0f} tokens/s, {result.flops_per_s / 1e12:,.3f} TFLOP/s, {mfu}",
        f"memory   {result.peak_memory_bytes / 2**30:,.2f} GiB at most",
    ]
    if result.graphs_after_warm_up:
        lines.append(f"compile  {result.graphs_after_warm_up} graphs compiled after warming up")
    lines.append(
        f"sample   {result.sample_tokens_per_s:,.1f} tokens/s, the first after {result.sample_first_s * 1e3:.1f} ms "
        f"of a prompt of {result.sample_prompt_tokens}"
    )
    return "\n".join(lines)
