"""torch.compile for the training step, and the way back when it does not work here.

Only the loss of a training step is compiled. The module stays as it is: names in checkpoints do not change, and
evaluation and sampling, whose shapes change, run it uncompiled.
"""

import os
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

Loss = Callable[[Tensor, Tensor], Tensor]  # (ids, targets), both (B, T) → mean loss, with gradients
MODES = ("auto", "on", "off")  # auto: on a GPU; on a CPU compiling costs a minute and gains little
# Micro-batches of other sizes, as while a size is being chosen, are compiled anew; torch gives up after 8 by itself.
MOST_SIZES = 64


def compile_loss(
    loss: Loss,
    mode: str,
    device: torch.device,
    note: Callable[[str], None],
    backend: str | Callable[..., object] = "inductor",
) -> Loss:
    """`loss`, for example `model.loss`, compiled where `mode` asks for it; `note` is told when that fails, and why.

    The first call of a size compiles. When that raises, for want of a C++ compiler or of Triton or for a bug, this and
    all later calls run `loss` itself. Running out of memory is not such a failure, and is raised.
    """
    if mode not in MODES:
        raise ValueError(f"compile is {', '.join(MODES)}, not {mode}")
    if mode == "off" or (mode == "auto" and device.type != "cuda"):
        return loss
    # torch's default is below /tmp, which a reboot empties: compiling again takes a minute or more.
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "workload" / "inductor"
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache))
    torch._dynamo.config.recompile_limit = MOST_SIZES
    compiled: Loss | None = torch.compile(loss, dynamic=False, backend=backend)

    def run(ids: Tensor, targets: Tensor) -> Tensor:
        nonlocal compiled
        if compiled is not None:
            try:
                return compiled(ids, targets)
            except torch.OutOfMemoryError:
                raise
            except Exception as error:
                reason = _first_line(error)
                note(f"torch.compile failed, so the training step runs uncompiled: {reason}")
                compiled = None
        return loss(ids, targets)

    return run


def _first_line(error: BaseException) -> str:
    """What went wrong: torch wraps the reason and adds pages on debugging."""
    cause = getattr(error, "inner_exception", None) or error.__cause__ or error
    lines = [line.strip() for line in str(cause).splitlines() if line.strip()]
    return f"{type(cause).__name__}: {lines[0]}" if lines else type(cause).__name__
