"""The training run, from a configuration to a folder with checkpoints, metrics and a report.

RUN/config.toml     what was asked for                RUN/checkpoints/    see checkpoint.py
RUN/metrics.jsonl   see metrics.py                    RUN/report.html     see report.py
RUN/starts.jsonl    a line each time it was started   RUN/data/           token shards, when it made its own
"""

import errno
import json
import math
import os
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from workload import checkpoint, microbatch, parallel, preflight
from workload.checkpoint import Checkpoint, State
from workload.config import Config
from workload.data import Tokens, Windows, load_split
from workload.device import autocast, describe, peak_flops
from workload.errors import WorkloadError
from workload.evaluate import Score, evaluate
from workload.faults import is_device_lost, is_out_of_memory
from workload.feed import Feed
from workload.files import FULL, only_one, replace_text
from workload.generate import generate, stream_text
from workload.guard import MOST_ROLL_BACKS, MOST_SKIPS, Guard, gather_guard, judge, restore_guard, roll_back
from workload.metrics import Metrics
from workload.model import GPT2, count_parameters, estimate_flops
from workload.optim import Optimizers, gather_state, make_optimizer, restore_state, state_bytes
from workload.parallel import ALONE, World
from workload.prepare import find_shards
from workload.progress import Reporter
from workload.report import LiveReport
from workload.runs import save_config
from workload.schedule import fit_steps, learning_rate
from workload.telemetry import Telemetry
from workload.tokenizer import Tokenizer, count_bytes, load_tokenizer
from workload.writer import Writer

METRICS = "metrics.jsonl"
REACHED = "reached"  # on a run's other machines: the step of the newest checkpoint, which the first one has
DISK_ERRORS = (*FULL, errno.EROFS, errno.EIO)
PACE_FROM = 5  # updates of a start after which its pace is measured: the first are slow
PACE_UNTIL = 20  # and updates before which it says too little

Loss = Callable[[Tensor, Tensor], Tensor]
EXTRAS = ("guard/", "scaler/", "micro_batch/")  # in optimizer.safetensors besides moments: see Run.extras


def train(
    config: Config,
    out: Path,
    *,
    device: torch.device,
    dtype: torch.dtype,
    reporter: Reporter,
    threads: int = 1,
    clock: Callable[[], float] = time.monotonic,
    should_stop: Callable[[], bool] = lambda: False,
    make_loss: Callable[[GPT2], Loss] = lambda model: model.loss,
    world: World = ALONE,
) -> State:
    """Train until `config.train.steps` or until `should_stop`, going on from the newest checkpoint below `out`.

    make_loss: gives what a step calls in place of the model's `loss`, such as its compiled form.
    world: the processes that train it together; each calls this, in a group that `parallel.joined` made.
    Saved, then evaluated: nothing that evaluation does can lose a step. Returns where the run stands; it is finished
    when its step is its steps and it was not told to stop, which may have cut its last evaluation short.
    """
    with _alone_in(out, world):
        run = open_run(
            config,
            out,
            device=device,
            dtype=dtype,
            threads=threads,
            clock=clock,
            reporter=reporter,
            make_loss=make_loss,
            world=world,
        )

        def stops() -> bool:
            return world.any(should_stop())  # all ranks at the same step

        try:
            with run.writer:  # its end waits until everything is on the disk
                run.prepare()
                while True:
                    finished = run.state.step >= run.state.steps
                    evaluating = finished or run.state.step % config.train.eval_every == 0
                    # Asked once: who stops has saved, or goes on to the next step and saves that.
                    saving = evaluating or run.state.step % config.train.save_every == 0 or stops()
                    reporter.pause()
                    run.show()
                    if saving and run.state.step:
                        run.save()
                    if evaluating:
                        run.evaluate(should_stop)
                    reporter.go_on()
                    if finished or (saving and stops()):
                        return run.state
                    run.update()
                    run.fit_steps()
                    run.writer.check()
        except OSError as error:
            if error.errno in DISK_ERRORS:
                raise run.explain_disk(error) from error
            raise
        except RuntimeError as error:
            if is_device_lost(error):
                raise run.explain_loss(error) from error
            raise
        finally:
            run.close()


def _alone_in(out: Path, world: World) -> AbstractContextManager[None]:
    """Two trainings in one folder would each take the other's checkpoints for their own."""
    if not world.is_first:
        return nullcontext()
    out.mkdir(parents=True, exist_ok=True)
    return only_one(out)


def open_run(
    config: Config,
    out: Path,
    *,
    device: torch.device,
    dtype: torch.dtype,
    threads: int,
    clock: Callable[[], float],
    reporter: Reporter,
    make_loss: Callable[[GPT2], Loss] = lambda model: model.loss,
    world: World = ALONE,
) -> "Run":
    """Data, model and optimizer, new or as the newest complete checkpoint has them."""
    parallel.check(config.train, world, dtype)
    if world.is_first:
        save_config(out, config)
    data = config.data
    shards = world.in_turn(
        lambda: find_shards(
            data.source,
            out / "data",
            tokenizer=data.tokenizer,
            val_fraction=data.val_fraction,
            threads=threads,
        )
    )
    if world.machines > 1:
        same = {
            "tokens": parallel.name_tokens(shards),
            "torch": torch.__version__,
            "device": device.type,
            "dtype": str(dtype),
        }
        parallel.demand_same(world, same)
    windows = Windows(load_split(shards, "train"), config.model.n_ctx, config.train.seed)
    torch.manual_seed(config.train.seed)
    model = GPT2(config.model).to(device)
    state = State(
        step=0, steps=config.train.steps, sequences=0, best_val_loss=None, elapsed_s=0.0, metrics_bytes=0
    )
    complete = checkpoint.list_complete(out / "checkpoints") if world.is_first else []
    saved = parallel.send_checkpoint(checkpoint.load(complete[-1]) if complete else None, world)
    if saved is not None:
        # Steps that were fitted into max_seconds stay, unless other steps are asked for now.
        asked_again = saved.config.train.steps == config.train.steps
        state = saved.state if asked_again else replace(saved.state, steps=config.train.steps)
    writer = Writer(
        out / "checkpoints",
        keep=config.train.keep,
        keep_every=config.train.keep_every,
        note=reporter.note,
        clock=clock,
    )
    wrapped = parallel.wrap(model, world, make_loss(model))
    parallel.seed_rank(config.train.seed, state.step, world)
    share = config.train.batch // world.size
    run = Run(
        config=config,
        out=out,
        device=device,
        dtype=dtype,
        model=model,
        loss=wrapped.loss,
        loss_alone=model.loss,
        accumulate=wrapped.accumulate,
        world=world,
        optimizer=make_optimizer(model, config.train),
        scaler=torch.amp.GradScaler(device.type, enabled=dtype == torch.float16),
        feed=Feed(
            windows, config.train.batch, config.model.vocab_size, device, rank=world.rank, world=world.size
        ),
        val=load_split(shards, "val"),
        tokenizer=load_tokenizer(data.tokenizer),
        metrics=_open_metrics(out, world, state.metrics_bytes),
        writer=writer,
        telemetry=Telemetry(device),
        reporter=reporter,
        report=LiveReport(out),
        clock=clock,
        state=state,
        micro_batch=microbatch.largest_divisor(share, wanted) if (wanted := config.train.micro_batch) else 0,
        token_flops=estimate_flops(config.model),
        peak_flops=peak_flops(device, dtype),
        begun_s=clock() - state.elapsed_s,
        first_step=state.step,
    )
    if saved is not None:
        run.restore(saved)
    return run


@dataclass
class Run:
    """Everything that a run holds between two updates."""

    config: Config
    out: Path
    device: torch.device
    dtype: torch.dtype
    model: GPT2  # the weights: what is saved, evaluated and sampled from
    loss: Loss  # of the model, as it is trained: (ids, targets) (B, T) → mean
    loss_alone: Loss  # without other ranks, and uncompiled: trials would compile each size anew
    accumulate: Callable[[], AbstractContextManager[Any]]  # around every part of a step but the last
    world: World
    optimizer: Optimizers
    scaler: torch.amp.GradScaler  # of the loss, so that gradients in fp16 are not too small for it; else idle
    feed: Feed
    val: list[Tokens]
    tokenizer: Tokenizer
    metrics: Metrics
    writer: Writer  # of checkpoints, in the background
    telemetry: Telemetry
    reporter: Reporter
    report: LiveReport
    clock: Callable[[], float]
    state: State
    micro_batch: int  # sequences a forward pass; 0 until `prepare` has chosen
    token_flops: float  # to train on one token
    peak_flops: float | None  # FLOP/s of the device at most; None: not known
    begun_s: float  # on the clock, as if the run had never been interrupted
    first_step: int  # updates done when this start of the run, or its last way back, began
    pace_since: tuple[int, float] = (0, 0.0)  # (step, elapsed_s) from which the pace is measured
    guard: Guard = field(default_factory=Guard)

    @property
    def elapsed_s(self) -> float:
        return self.clock() - self.begun_s

    @property
    def checkpoints(self) -> Path:
        return self.out / "checkpoints"

    @property
    def tokens(self) -> int:
        """Tokens a step."""
        return self.config.train.batch * self.config.model.n_ctx

    @property
    def share(self) -> int:
        """Sequences of a step that are this rank's."""
        return self.config.train.batch // self.world.size

    def prepare(self) -> None:
        """All that comes before the first step: room on the disk, the micro-batch, and what is said of the run."""
        if self.world.is_first:
            preflight.check_disk(self.checkpoints, self._measure_disk())
        self.micro_batch = self.micro_batch or self._choose_micro_batch()
        self.announce()

    def close(self) -> None:
        """Files and threads; not the work, which `save` has or has not saved."""
        self.feed.close()
        with suppress(OSError):  # each row was written at once: what cannot be written now has been told
            _close(self.metrics)

    def update(self) -> None:
        """One step: the next `batch` sequences, one change of the weights, one row of metrics."""
        started_s = self.elapsed_s
        lr = learning_rate(self.state.step, self.state.steps, self.config.train)
        loss, grad_norm = self.gradients()
        reason = self._judge(loss, grad_norm)
        if reason is None:
            self.optimizer.set_rate(lr)
            self.optimizer.step()
        self.scaler.update()
        self.optimizer.zero_grad()
        self.state = replace(
            self.state,
            step=self.state.step + 1,
            sequences=self.state.sequences + self.config.train.batch,
            elapsed_s=self.elapsed_s,
        )
        self._log_step(loss, lr, grad_norm, self.state.elapsed_s - started_s)
        if self.state.step == self.first_step + 1:
            self._mark(self.first_step)
        if reason:
            self._event(f"{reason}: update left out")
        if reason and self.guard.skips >= MOST_SKIPS:
            self.roll_back(reason)

    def gradients(self) -> tuple[float, float]:
        """`_accumulate`; with a smaller micro-batch, and the same draws, when memory runs out."""
        random = checkpoint.gather_random(self.device)
        while True:
            try:
                return self._accumulate()
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                if self.world.kind:
                    raise self._too_large_together() from error
            # Outside of the handler: there the traceback still holds the tensors that filled the memory.
            self._shrink()
            checkpoint.restore_random(random, self.device)

    def _accumulate(self) -> tuple[float, float]:
        """Gradients of the mean loss of the next `batch` sequences, clipped; returns that loss and their norm before."""
        wanted = self.config.train
        parts = torch.split(self.feed.take(self.state.sequences), self.micro_batch)
        total = torch.zeros((), device=self.device)
        for i, part in enumerate(parts, start=1):
            with self.accumulate() if i < len(parts) else nullcontext():
                total += self._backward(part, len(parts))
        self.world.mean(total)
        for optimizer in self.optimizer.parts:
            self.scaler.unscale_(optimizer)
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), wanted.clip or math.inf)
        numbers = torch.stack(
            (total, parallel.full_norm(norm))
        ).tolist()  # the one wait for the device in a step
        loss, grad_norm = self.world.agree(*numbers)
        return loss, grad_norm

    def _backward(self, part: Tensor, parts: int, *, alone: bool = False) -> Tensor:
        """Add the gradients of one of `parts` micro-batches; returns its share of the loss."""
        compute = self.loss_alone if alone else self.loss
        with autocast(self.device, self.dtype):
            loss = compute(part[:, :-1], part[:, 1:]) / parts
        self.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
        return loss.detach()

    def _judge(self, loss: float, grad_norm: float) -> str | None:
        """None to update; else why not, or "" for an overflow by which the scaler finds its scale."""
        finding = self.scaler.is_enabled() and self.scaler.get_scale() > 1.0
        if finding and math.isfinite(loss) and not math.isfinite(grad_norm):
            return ""
        wanted = self.config.train
        self.guard, reason = judge(
            self.guard, loss, grad_norm, deviations=wanted.guard, window=wanted.guard_window
        )
        return reason or None

    def _log_step(self, loss: float, lr: float, grad_norm: float, took_s: float) -> None:
        rate = self.tokens / max(took_s, 1e-9)
        mfu = self._mfu(rate)
        gpu = self.telemetry.read()
        optional = gpu if mfu is None else {"mfu": round(mfu, 4), **gpu}
        self.metrics.write(
            "step",
            self.state.step,
            loss=loss if math.isfinite(loss) else None,
            lr=lr,
            grad_norm=grad_norm if math.isfinite(grad_norm) else None,
            tokens=self.state.sequences * self.config.model.n_ctx,
            tokens_per_s=round(rate, 1),
            elapsed_s=round(self.state.elapsed_s, 3),
            **optional,
        )
        self.reporter.step(
            self.state.step,
            self.state.steps,
            loss=loss,
            lr=lr,
            grad_norm=grad_norm,
            tokens=self.tokens,
            mfu=mfu,
            gpu=gpu,
        )

    def _mfu(self, tokens_per_s: float) -> float | None:
        """The part of the device's peak that this rate is; None where the peak is not known."""
        return None if self.peak_flops is None else tokens_per_s * self.token_flops / self.peak_flops

    def _choose_micro_batch(self) -> int:
        """On a GPU by trying sizes on the first sequences, which changes nothing; on a CPU by arithmetic alone.

        So a run on a CPU adds up its gradients in the same order however often it is interrupted, to the last bit.
        """
        n_ctx = self.config.model.n_ctx
        if self.device.type == "cpu" or self.world.kind == "fsdp":  # no rank of fsdp can try alone
            return microbatch.bounded(self.share, n_ctx)
        return self.world.first(self._try_sizes() if self.world.is_first else 0)

    def _try_sizes(self) -> int:
        trials = self.probe(microbatch.sizes(self.share))
        chosen = microbatch.choose(trials)
        if chosen is None:
            raise self._too_large()
        self.reporter.note(
            "tried    "
            + ", ".join(
                f"{t.size}: {t.tokens_per_s:,.0f} tok/s" if t.tokens_per_s else f"{t.size}: does not fit"
                for t in trials
            )
        )
        return chosen

    def probe(self, candidates: list[int]) -> list[microbatch.Trial]:
        """Time forward and backward passes of these micro-batches. Weights, generators and data stay as they are."""
        random = checkpoint.gather_random(self.device)
        # Room that the optimizer will take with its first update.
        fresh = not gather_state(self.optimizer, self.model)
        reserve = state_bytes(self.model, self.config.train) if fresh and self.device.type == "cuda" else 0
        ballast = torch.empty(reserve, dtype=torch.uint8, device=self.device)
        trials = microbatch.probe(candidates, self._try_size)
        del ballast
        self._clear()
        checkpoint.restore_random(random, self.device)
        return trials

    def _try_size(self, size: int) -> float:
        """Tokens/s with micro-batches of `size`. Raises torch.OutOfMemoryError when it does not fit, or barely does."""
        microbatch.reset_peak(self.device)
        try:
            ids = self.feed.load(self.state.sequences, size)
            took_s = microbatch.time_steps(lambda: float(self._backward(ids, 1, alone=True)), self.clock)
            if microbatch.over_headroom(self.device):
                raise torch.OutOfMemoryError(f"micro-batch {size} leaves no room")
        finally:
            self._clear()
        return size * self.config.model.n_ctx / max(took_s, 1e-9)

    def _shrink(self) -> None:
        """Halve the micro-batch, or say that nothing fits."""
        self._clear()
        size = microbatch.smaller(self.share, self.micro_batch)
        if size is None:
            raise self._too_large()
        self._event(f"out of memory with micro-batch {self.micro_batch}: going on with {size}")
        self.micro_batch = size

    def _clear(self) -> None:
        """Forget gradients, and give unused memory back."""
        self.optimizer.zero_grad()
        microbatch.free_memory(self.device)

    def _too_large_together(self) -> WorkloadError:
        """Ranks must take the same number of parts, so one of them cannot go on with smaller ones by itself."""
        smaller = microbatch.smaller(self.share, self.micro_batch)
        if smaller is None:
            return self._too_large()
        return WorkloadError(
            f"step {self.state.step}: out of memory on rank {self.world.rank} with micro-batch {self.micro_batch}",
            f"the same command with --set train.micro_batch={smaller} goes on from the last checkpoint",
        )

    def _too_large(self) -> WorkloadError:
        return WorkloadError(
            f"one sequence of {self.config.model.n_ctx} tokens does not fit the memory of {self.device} "
            f"with {count_parameters(self.model):,} parameters",
            "close what else uses it, or begin a smaller model: fewer model.n_layer, n_embd or n_ctx",
        )

    def roll_back(self, reason: str) -> None:
        """To a checkpoint before the trouble, and on with sequences that were not seen yet.

        The first time to the newest; when that did not help, to the one before. Only checkpoints that the plan asks
        for, while there are any: those that a stop left would make an interrupted run go another way. Where none is
        old enough the oldest does: what was left out has not changed the weights.
        """
        wanted, was = self.config.train, self.state
        self.writer.wait()
        complete = self.world.first(checkpoint.list_complete(self.checkpoints))
        planned = [path for path in complete if self._is_planned(_step_of(path))] or complete
        usable = [path for path in planned if _step_of(path) <= was.step - MOST_SKIPS] or planned[:1]
        if not usable or self.guard.roll_backs >= MOST_ROLL_BACKS:
            tried = (
                f" after going back {self.guard.roll_backs} times"
                if usable
                else " before the first checkpoint"
            )
            raise WorkloadError(
                f"step {was.step}: {reason}; the last {MOST_SKIPS} updates were left out{tried}",
                f"go on with a smaller --set train.lr (now {wanted.lr:g}), with --dtype fp32, or, when the data is to "
                "blame and not the run, with --set train.guard=0",
            )
        target = usable[-1 - min(self.guard.roll_backs, len(usable) - 1)]
        loaded = checkpoint.load(target) if self.world.is_first else None
        saved = parallel.send_checkpoint(loaded, self.world)
        assert saved is not None
        if self.world.is_first:
            for path in complete[complete.index(target) + 1 :]:
                checkpoint.remove(path)
            checkpoint.point(self.checkpoints, "latest", target.name)
        trouble = self.guard
        self.restore(saved)
        self.guard = roll_back(self.guard, trouble)
        self.state = replace(saved.state, sequences=was.sequences, elapsed_s=self.elapsed_s)
        self.first_step = saved.state.step
        _close(self.metrics)
        self.metrics = _open_metrics(self.out, self.world, saved.state.metrics_bytes)
        self._event(
            f"{MOST_SKIPS} updates up to step {was.step} left out, the last for {reason}: back to step "
            f"{self.state.step}, on with the data after sequence {was.sequences}"
        )

    def _is_planned(self, step: int) -> bool:
        return step % self.config.train.save_every == 0 or step % self.config.train.eval_every == 0

    def extras(self) -> dict[str, Tensor]:
        """What updates depend on besides weights, moments and generators, as tensors of the checkpoint."""
        guard = {f"guard/{name}": tensor for name, tensor in gather_guard(self.guard).items()}
        scaler = {f"scaler/{name}": torch.tensor(value) for name, value in self.scaler.state_dict().items()}
        size = {f"micro_batch/{self._device_name()}": torch.tensor(self.micro_batch)}
        return guard | scaler | size

    def restore(self, saved: Checkpoint) -> None:
        """All that a checkpoint holds, but for `state`."""
        parallel.load_weights(self.model, saved.model)
        extras = {name: t for name, t in saved.optimizer.items() if name.startswith(EXTRAS)}
        moments = {name: t for name, t in saved.optimizer.items() if name not in extras}
        restore_state(self.optimizer, self.model, moments)
        for optimizer in self.optimizer.parts:
            parallel.shard_optimizer(optimizer)
        if random := parallel.own_random(saved.random, self.world):  # else: there were fewer ranks then
            checkpoint.restore_random(random, self.device)
        self.guard = restore_guard(_below("guard/", extras))
        scaler = _below("scaler/", extras)
        if scaler and self.scaler.is_enabled():
            self.scaler.load_state_dict({name: tensor.item() for name, tensor in scaler.items()})
        size = extras.get(f"micro_batch/{self._device_name()}")
        if size is not None and not self.config.train.micro_batch:
            # it decides in what order gradients are added up
            self.micro_batch = microbatch.largest_divisor(self.share, int(size))

    def _device_name(self) -> str:
        return torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else self.device.type

    def explain_disk(self, error: OSError) -> WorkloadError:
        """For a disk that takes no more rows or reports."""
        complete = checkpoint.list_complete(self.checkpoints)
        newest = f"the newest complete checkpoint is {complete[-1].name}" if complete else "no checkpoint yet"
        return WorkloadError(
            f"step {self.state.step}: {self.out} could not be written: {error}",
            f"{newest}; make room, then: python -m workload train --resume --out {self.out}",
        )

    def explain_loss(self, error: BaseException) -> WorkloadError:
        """For a device that does not answer any more."""
        complete = checkpoint.list_complete(self.checkpoints)
        kept = f"{complete[-1].name} is safe" if complete else "there was no checkpoint yet"
        return WorkloadError(
            f"step {self.state.step}: {self.device} was lost: {str(error).splitlines()[0]}; {kept}",
            f"dmesg and nvidia-smi say why; then: python -m workload train --resume --out {self.out}",
        )

    def fit_steps(self) -> None:
        """Plan fewer steps when this machine will not finish in max_seconds, more again when it will; says so."""
        state, wanted, ran = self.state, self.config.train, self.state.step - self.first_step
        if ran == PACE_FROM:
            self.pace_since = (state.step, state.elapsed_s)
        if ran == PACE_UNTIL:
            self._announce_pace()
        if ran < PACE_UNTIL:
            return
        steps = fit_steps(
            state.step, state.steps, wanted.steps, state.elapsed_s, wanted.max_seconds, self.pace_since
        )
        if wanted.max_seconds:
            steps = self.world.first(steps)  # by the clock of rank 0
        if steps != state.steps:
            self.state = replace(state, steps=steps)
            self._event(
                f"planning {steps} steps instead of {state.steps}, to end within {wanted.max_seconds:.0f} s"
            )

    def save(self) -> None:
        """Begin to write a checkpoint of this step; the rows of metrics so far reach the disk before it is complete."""
        rows = self.out / METRICS
        model = parallel.gather_tensors(self.model.state_dict(), self.world)
        optimizer = parallel.gather_tensors(gather_state(self.optimizer, self.model), self.world)
        random = parallel.gather_random(checkpoint.gather_random(self.device), self.world)
        if not self.world.is_first:
            self._mark(self.state.step)
            return
        self.state = replace(self.state, elapsed_s=self.elapsed_s, metrics_bytes=rows.stat().st_size)
        self.writer.save(
            self.config,
            self.state,
            model=model,
            optimizer=optimizer | self.extras(),
            random=random,
            beside=[rows],
        )

    def _mark(self, step: int) -> None:
        """On machines that have no checkpoints: how far the run is, for who counts failures that led nowhere."""
        if self.world.machines > 1 and self.world.local_rank == 0 and not self.world.is_first:
            self.out.mkdir(parents=True, exist_ok=True)
            replace_text(self.out / REACHED, f"{checkpoint.folder_name(step)}\n")

    def evaluate(self, should_stop: Callable[[], bool]) -> None:
        """Validation loss, the best checkpoint, a sample, the report; any of them only while not told to stop.

        Several ranks do not stop in it. Rank 0 does it alone, but for fsdp, where it takes all of them.
        """
        if self.world.kind == "ddp" and not self.world.is_first:
            return
        if self.world.kind:
            should_stop = _never
        wanted, step = self.config.train, self.state.step
        score = self._score(should_stop)
        if score is None:
            return
        self.metrics.write(
            "eval",
            step,
            val_loss=score.loss,
            val_bits_per_byte=score.bits_per_byte,
            elapsed_s=round(self.elapsed_s, 3),
        )
        self.reporter.validated(step, score.loss, score.bits_per_byte)
        if step and (self.state.best_val_loss is None or score.loss < self.state.best_val_loss):
            self.state = replace(self.state, best_val_loss=score.loss)
            if self.world.is_first:
                self.writer.point_best(step)
        if wanted.sample_tokens:
            prompt = self.tokenizer.encode(wanted.sample_prompt) or [self.tokenizer.eot]
            tokens = generate(
                self.model,
                prompt,
                wanted.sample_tokens,
                n_vocab=self.tokenizer.eot + 1,
                seed=wanted.seed,
                dtype=self.dtype,
                should_stop=should_stop,
            )
            with parallel.whole(self.model):
                text = "".join(stream_text(self.tokenizer, tokens))
            if should_stop():
                return
            self.metrics.write("sample", step, prompt=wanted.sample_prompt, text=text)
        if self.world.is_first:
            self.report.save("finished" if step >= self.state.steps else "at work")

    def show(self) -> None:
        """Bring the report up to date now and then, for who watches it."""
        if self.world.is_first:
            self.report.step()

    def _score(self, should_stop: Callable[[], bool]) -> Score | None:
        """The validation loss, with as many sequences at once as fit."""
        size = self.micro_batch
        while True:
            try:
                return evaluate(
                    self.model,
                    self.val,
                    count_bytes(self.tokenizer),
                    sequences=self.config.train.eval_sequences,
                    micro_batch=size,
                    dtype=self.dtype,
                    should_stop=should_stop,
                )
            except RuntimeError as error:
                if not is_out_of_memory(error) or size == 1 or self.world.kind == "fsdp":
                    raise
            size //= 2
            self.model.train()
            microbatch.free_memory(self.device)

    def announce(self) -> None:
        """What is about to happen, for the person and for the report."""
        if not self.world.is_first:
            return
        wanted, model = self.config.train, self.config.model
        environment = ", ".join(
            filter(None, (describe(self.device, self.dtype), parallel.describe(self.world)))
        )
        windows = self.feed.windows
        epochs = self.state.steps * wanted.batch / windows.n
        start = {
            "from_step": self.state.step,
            "environment": environment,
            "parameters": count_parameters(self.model),
        }
        with (self.out / "starts.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(start) + "\n")
        note = self.reporter.note
        note(f"run      {self.out}" + (f", going on from step {self.state.step}" if self.state.step else ""))
        note(
            f"model    GPT-2, {start['parameters']:,} parameters: {model.n_layer} layers, {model.n_head} heads, "
            f"{model.n_embd} channels, {model.n_ctx} tokens of context; {self.token_flops / 1e6:,.1f} MFLOP a token"
        )
        note(
            f"data     {self.config.data.source}: {sum(map(len, windows.shards)):,} {self.tokenizer.name} tokens to "
            f"train on, {sum(map(len, self.val)):,} to validate"
        )
        note(
            f"plan     {self.state.steps} steps of {self.tokens:,} tokens, {epochs:,.1f} times through the data"
        )
        note(f"batch    {wanted.batch} sequences, {self.micro_batch} at a time")
        note(f"machine  {environment}")

    def _announce_pace(self) -> None:
        """Once the pace is known: what the rest will take. Only said; who does not like it stops it."""
        since, now = self.pace_since, self.state
        done, took_s, left = now.step - since[0], now.elapsed_s - since[1], now.steps - now.step
        if done <= 0 or took_s <= 0 or left <= 0:
            return
        rate = done * self.tokens / took_s
        pace = preflight.render_pace(
            tokens_per_s=rate, mfu=self._mfu(rate), eta_s=left * took_s / done, steps_left=left
        )
        self.reporter.note(f"pace     {pace}")
        self.reporter.note(f"disk     {preflight.render_disk(self._measure_disk())}")

    def _measure_disk(self) -> preflight.Disk:
        size = 4 * count_parameters(self.model) + state_bytes(self.model, self.config.train)
        return preflight.measure_disk(
            self.checkpoints, self.config.train, self.state.steps, checkpoint_bytes=size
        )

    def _event(self, text: str) -> None:
        self.metrics.write("event", self.state.step, text=text)
        self.reporter.note(f"step {self.state.step}: {text}")


def _open_metrics(out: Path, world: World, keep_bytes: int) -> Metrics:
    """The run's rows; ranks other than 0 write theirs to nowhere."""
    return Metrics(out / METRICS, keep_bytes) if world.is_first else Metrics(Path(os.devnull), 0)


def _close(metrics: Metrics) -> None:
    with metrics:
        pass


def _never() -> bool:
    return False


def _step_of(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def _below(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Those whose names begin with `prefix`, without it."""
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
