"""The training run, from a configuration to a folder with checkpoints, metrics and a report.

RUN/config.toml     what was asked for                RUN/checkpoints/    see checkpoint.py
RUN/metrics.jsonl   see metrics.py                    RUN/report.html     see report.py
RUN/starts.jsonl    a line each time it was started   RUN/data/           token shards, when it made its own
"""

import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from workload import checkpoint
from workload.checkpoint import State
from workload.config import Config
from workload.data import Tokens, Windows, load_split
from workload.device import autocast, describe
from workload.errors import WorkloadError
from workload.evaluate import evaluate
from workload.generate import generate, stream_text
from workload.metrics import Metrics
from workload.model import GPT2, count_parameters, estimate_flops
from workload.optim import gather_state, make_optimizer, restore_state
from workload.prepare import find_shards
from workload.progress import Reporter
from workload.report import save_report
from workload.runs import save_config
from workload.schedule import fit_steps, learning_rate
from workload.tokenizer import Tokenizer, count_bytes, load_tokenizer

MOST_SKIPS = 20  # updates in a row whose gradient was not finite, before giving up
PACE_FROM = 5  # updates of a start after which its pace is measured: the first are slow
PACE_UNTIL = 20  # and updates before which it says too little


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
) -> State:
    """Train until `config.train.steps` or until `should_stop`, going on from the newest checkpoint below `out`.

    Saved, then evaluated: nothing that evaluation does can lose a step. Returns where the run stands; it is finished
    when its step is its steps and it was not told to stop, which may have cut its last evaluation short.
    """
    run = open_run(config, out, device=device, dtype=dtype, threads=threads, clock=clock, reporter=reporter)
    with run.metrics:
        while True:
            finished = run.state.step >= run.state.steps
            evaluating = finished or run.state.step % config.train.eval_every == 0
            # Asked once: who stops has saved, or goes on to the next step and saves that.
            saving = evaluating or run.state.step % config.train.save_every == 0 or should_stop()
            reporter.pause()
            if saving and run.state.step:
                run.save()
            if evaluating:
                run.evaluate(should_stop)
            reporter.go_on()
            if finished or (saving and should_stop()):
                return run.state
            run.update()
            run.fit_steps()


def open_run(
    config: Config,
    out: Path,
    *,
    device: torch.device,
    dtype: torch.dtype,
    threads: int,
    clock: Callable[[], float],
    reporter: Reporter,
) -> "Run":
    """Data, model and optimizer, new or as the newest complete checkpoint has them."""
    save_config(out, config)
    data = config.data
    shards = find_shards(
        data.source, out / "data", tokenizer=data.tokenizer, val_fraction=data.val_fraction, threads=threads
    )
    windows = Windows(load_split(shards, "train"), config.model.n_ctx, config.train.seed)
    torch.manual_seed(config.train.seed)
    model = GPT2(config.model).to(device)
    optimizer = make_optimizer(model, config.train)
    state = State(
        step=0, steps=config.train.steps, sequences=0, best_val_loss=None, elapsed_s=0.0, metrics_bytes=0
    )
    complete = checkpoint.list_complete(out / "checkpoints")
    if complete:
        saved = checkpoint.load(complete[-1])
        model.load_state_dict(saved.model)
        restore_state(optimizer, model, saved.optimizer)
        checkpoint.restore_random(saved.random, device)
        # Steps that were fitted into max_seconds stay, unless other steps are asked for now.
        asked_again = saved.config.train.steps == config.train.steps
        state = saved.state if asked_again else replace(saved.state, steps=config.train.steps)
    run = Run(
        config=config,
        out=out,
        device=device,
        dtype=dtype,
        model=model,
        optimizer=optimizer,
        windows=windows,
        val=load_split(shards, "val"),
        tokenizer=load_tokenizer(data.tokenizer),
        metrics=Metrics(out / "metrics.jsonl", state.metrics_bytes),
        reporter=reporter,
        clock=clock,
        state=state,
        begun_s=clock() - state.elapsed_s,
        first_step=state.step,
    )
    run.announce()
    return run


@dataclass
class Run:
    """Everything that a run holds between two updates."""

    config: Config
    out: Path
    device: torch.device
    dtype: torch.dtype
    model: GPT2
    optimizer: torch.optim.Optimizer
    windows: Windows
    val: list[Tokens]
    tokenizer: Tokenizer
    metrics: Metrics
    reporter: Reporter
    clock: Callable[[], float]
    state: State
    begun_s: float  # on the clock, as if the run had never been interrupted
    first_step: int  # updates done when this start of the run began
    pace_since: tuple[int, float] = (0, 0.0)  # (step, elapsed_s) from which the pace is measured
    skips: int = 0  # updates skipped in a row

    @property
    def elapsed_s(self) -> float:
        return self.clock() - self.begun_s

    def update(self) -> None:
        """One step: the next `batch` sequences, one change of the weights, one row of metrics."""
        wanted, started_s = self.config.train, self.elapsed_s
        lr = learning_rate(self.state.step, self.state.steps, wanted)
        loss, grad_norm = self._accumulate()
        # Asked before the update: weights that became NaN do not recover, a batch left out is not missed.
        is_finite = math.isfinite(loss) and math.isfinite(grad_norm)
        if is_finite:
            for group in self.optimizer.param_groups:
                group["lr"] = lr
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.state = replace(
            self.state,
            step=self.state.step + 1,
            sequences=self.state.sequences + wanted.batch,
            elapsed_s=self.elapsed_s,
        )
        tokens = wanted.batch * self.config.model.n_ctx
        self.metrics.write(
            "step",
            self.state.step,
            loss=loss if is_finite else None,
            lr=lr,
            grad_norm=grad_norm if is_finite else None,
            tokens=self.state.sequences * self.config.model.n_ctx,
            tokens_per_s=round(tokens / max(self.state.elapsed_s - started_s, 1e-9), 1),
            elapsed_s=round(self.state.elapsed_s, 3),
        )
        self.reporter.step(
            self.state.step, self.state.steps, loss=loss, lr=lr, grad_norm=grad_norm, tokens=tokens
        )
        self.skips = 0 if is_finite else self.skips + 1
        if not is_finite:
            self._event("a gradient that is not finite: update left out")
        if self.skips == MOST_SKIPS:
            raise WorkloadError(
                f"step {self.state.step}: the last {MOST_SKIPS} updates had gradients that are not finite",
                "resume with a smaller --set train.lr, or with --dtype fp32",
            )

    def _accumulate(self) -> tuple[float, float]:
        """Gradients of the mean loss of the next `batch` sequences, clipped; returns that loss and their norm before."""
        wanted = self.config.train
        batch = torch.from_numpy(self.windows.batch(self.state.sequences, wanted.batch))
        if self.device.type == "cuda":
            batch = batch.pin_memory()
        ids = batch.to(self.device, non_blocking=True)
        parts = torch.split(ids, wanted.micro_batch)
        total = torch.zeros((), device=self.device)
        for part in parts:
            with autocast(self.device, self.dtype):
                loss = self.model.loss(part[:, :-1], part[:, 1:]) / len(parts)
            loss.backward()  # type: ignore[no-untyped-call]
            total += loss.detach()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), wanted.clip or math.inf)
        return total.item(), norm.item()  # the one wait for the device in a step

    def fit_steps(self) -> None:
        """Plan fewer steps when this machine will not finish in max_seconds, more again when it will; says so."""
        state, wanted, ran = self.state, self.config.train, self.state.step - self.first_step
        if ran == PACE_FROM:
            self.pace_since = (state.step, state.elapsed_s)
        if ran < PACE_UNTIL:
            return
        steps = fit_steps(
            state.step, state.steps, wanted.steps, state.elapsed_s, wanted.max_seconds, self.pace_since
        )
        if steps != state.steps:
            self.state = replace(state, steps=steps)
            self._event(
                f"planning {steps} steps instead of {state.steps}, to end within {wanted.max_seconds:.0f} s"
            )

    def save(self) -> None:
        """A complete checkpoint of this step, and no more of them than the policy keeps."""
        folder, wanted = self.out / "checkpoints", self.config.train
        self.state = replace(self.state, elapsed_s=self.elapsed_s, metrics_bytes=self.metrics.sync())
        checkpoint.save(
            folder,
            self.config,
            self.state,
            model=self.model.state_dict(),
            optimizer=gather_state(self.optimizer, self.model),
            random=checkpoint.gather_random(self.device),
        )
        checkpoint.prune(folder, keep=wanted.keep, keep_every=wanted.keep_every)

    def evaluate(self, should_stop: Callable[[], bool]) -> None:
        """Validation loss, the best checkpoint, a sample, the report; any of them only while not told to stop."""
        wanted, step = self.config.train, self.state.step
        score = evaluate(
            self.model,
            self.val,
            count_bytes(self.tokenizer),
            sequences=wanted.eval_sequences,
            micro_batch=wanted.micro_batch,
            dtype=self.dtype,
            should_stop=should_stop,
        )
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
            checkpoint.point(self.out / "checkpoints", "best", checkpoint.folder_name(step))
            checkpoint.prune(self.out / "checkpoints", keep=wanted.keep, keep_every=wanted.keep_every)
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
            text = "".join(stream_text(self.tokenizer, tokens))
            if should_stop():
                return
            self.metrics.write("sample", step, prompt=wanted.sample_prompt, text=text)
        save_report(self.out)

    def announce(self) -> None:
        """What is about to happen, for the person and for the report."""
        wanted, model = self.config.train, self.config.model
        environment = describe(self.device, self.dtype)
        tokens = wanted.batch * model.n_ctx
        epochs = self.state.steps * wanted.batch / self.windows.n
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
            f"{model.n_embd} channels, {model.n_ctx} tokens of context; {estimate_flops(model) / 1e6:,.1f} MFLOP a token"
        )
        note(
            f"data     {self.config.data.source}: {sum(map(len, self.windows.shards)):,} {self.tokenizer.name} tokens to "
            f"train on, {sum(map(len, self.val)):,} to validate"
        )
        note(f"plan     {self.state.steps} steps of {tokens:,} tokens, {epochs:,.1f} times through the data")
        note(f"machine  {environment}")

    def _event(self, text: str) -> None:
        self.metrics.write("event", self.state.step, text=text)
        self.reporter.note(f"step {self.state.step}: {text}")
