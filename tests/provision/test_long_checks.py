"""The checks that take minutes, each program run for real on the processor; what only cards say is a mock, and marked so."""

import importlib
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path, PurePosixPath
from types import ModuleType

import pytest

from provision.checks import Check, Outcome
from provision.gpu_checks import together
from provision.long_checks import disk_speed, load, long_checks, processor, training_speed
from provision.programs import program
from provision.system.python import ENVIRONMENT
from tests.provision.test_system_checks import bad, programs
from tests.provision.test_verify import run

torch = pytest.importorskip("torch")


def here(check: Check) -> Check:
    """The check with this Python in place of the machine's environment."""
    return replace(check, script=check.script.replace(f"{ENVIRONMENT}/bin/python", sys.executable))


def module(name: str) -> ModuleType:
    return importlib.import_module(f"provision.programs.{name}")


def test_all_of_them_are_bash_and_programs_that_compile() -> None:
    for has_gpu in (True, False):
        wanted = long_checks(has_gpu, PurePosixPath("/home/ml/metal/source/x"))
        for check in wanted:
            checked = subprocess.run(["bash", "-n"], input=check.script, text=True, capture_output=True)
            assert checked.returncode == 0, checked.stderr
        names = [check.name for check in wanted]
        assert len(set(names)) == len(names)
        assert {"disk speed", "training speed", "load"} <= set(names)
        assert ("processor computes" in names) is not has_gpu
    for name in ("compute", "disk", "learn", "load", "speed", "together"):
        compile(program(name), name, "exec")


# --- the disk --------------------------------------------------------------------------------------------------------


def test_a_disk_is_measured_and_nothing_is_left_behind(tmp_path: Path) -> None:
    outcome = run([here(disk_speed())], HOME=str(tmp_path))[0]
    assert outcome.good, outcome.seen
    assert set(outcome.figures) == {"disk_write_mb_per_s", "disk_read_mb_per_s", "disk_reads_per_s"}
    assert all(value > 0 for value in outcome.figures.values())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("kind", "speed", "good", "remedy"),
    [
        ("disk 0 nvme", "700 200", True, ""),
        ("disk 0 nvme", "690 200", False, "fstrim"),
        ("disk 0 nvme", "700 190", False, "fstrim"),
        ("disk 0 sata", "300 100", True, ""),
        ("disk 1 sata", "40 100", False, "put the data on an SSD"),
        ("disk 0 ", "1 1", True, ""),
    ],
)
def test_what_a_disk_is_says_what_it_should_do(
    tmp_path: Path, kind: str, speed: str, good: bool, remedy: str
) -> None:
    """lsblk and the measurement are mocks: which disk is here, and how fast, nobody knows."""
    measure = (
        f'for least; do :; done; read -r r w <<< "{speed}"; shift 6; echo "$r MB/s"; (($1 <= r && $2 <= w))'
    )
    path = programs(tmp_path / "bin", lsblk=f"echo '{kind}'; echo 'part 0 '", measure=measure)
    check = disk_speed()
    outcome = run(
        [replace(check, script=check.script.replace(f"{ENVIRONMENT}/bin/python", "measure"))],
        PATH=path,
        HOME=str(tmp_path),
    )[0]
    assert outcome.good is good, outcome.seen
    assert good or remedy in outcome.check.remedy


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root: a mount in a namespace of its own")
def test_a_full_disk_is_not_measured(tmp_path: Path) -> None:
    """A real file system in memory with 4 MiB."""
    argv = ["unshare", "--mount", "--propagation", "private", "bash", "-c"]
    done = subprocess.run(
        [*argv, f'mount -t tmpfs -o size=4m tmpfs {tmp_path} && "$0" -c "$1" {tmp_path} 1 0 0', sys.executable, program("disk")],
        capture_output=True,
        text=True,
    )  # fmt: skip
    assert done.returncode == 1
    assert "has no room to try it: 4 MiB are free" in done.stderr
    assert disk_speed().remedy_for(done.stderr) == "See free space."


# --- computing -------------------------------------------------------------------------------------------------------


def test_a_processor_computes_and_says_where_there_is_no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    compute = module("compute")
    monkeypatch.setattr(shutil, "which", lambda name: None)
    said = compute.prove_processor()
    assert said.endswith("float32, bfloat16, torch.compile not tried, for there is no C++ compiler")
    assert "memtest86+" in processor().remedy_for(
        "AssertionError: cpu: a product in torch.float32 is wrong by 0.3"
    )


def test_two_processes_add_up() -> None:
    """Real torchrun and Gloo; NCCL needs cards."""
    outcome = run([together(count="2", python=sys.executable)])[0]
    assert outcome.good, outcome.seen
    assert "2 processes by Gloo: the sum is right" in outcome.seen
    assert outcome.figures["all_reduce_gb_per_s"] > 0


def test_a_sum_that_is_wrong_is_found(tmp_path: Path) -> None:
    """A fault that is put into the second process: what it adds is not what it should."""
    broken = program("together").replace("float(rank + 1)", "float(rank + 2)")
    check = together(count="2", python=sys.executable)
    (tmp_path / "together.py").write_text(broken)
    script = check.script.replace('"$scratch/together.py" >', f"{tmp_path}/together.py >")
    bad(run([replace(check, script=script)])[0], "the sum over 2 is 5.0, and not 3.0", "sums up wrongly")


@pytest.mark.parametrize(
    ("said", "remedy"),
    [
        ("torch.distributed.DistBackendError: NCCL error: unhandled system error, No space left on device /dev/shm/nccl-1", "df /dev/shm"),
        ("[rank0]:[E] Watchdog caught collective operation timeout: WorkNCCL(OpType=ALLREDUCE)", "ACS and IOMMU"),
        ("RuntimeError: something else", "NCCL_DEBUG=INFO"),
    ],
)  # fmt: skip
def test_what_nccl_says_decides_the_remedy(said: str, remedy: str) -> None:
    """Lines as NCCL writes them; there are no cards here that could."""
    assert remedy in together().remedy_for(said)


# --- training steps --------------------------------------------------------------------------------------------------

# Prints what `workload bench --json` would, on the card that it was given.
BENCH = """
import json, os, sys
card = os.environ.get("CUDA_VISIBLE_DEVICES")
assert sys.argv[1:3] == ["bench", "--preset"] and "--json" in sys.argv
said = json.loads(os.environ["BENCH"])[int(card or 0)]
if isinstance(said, str):
    sys.exit(said)
print(json.dumps({"environment": "NVIDIA X, bfloat16, torch 2", "parameters": 124e6, "micro_batch": 16, "n_ctx": 1024,
                  "compiled": True, **said}))
"""


def bench(tmp_path: Path, answers: list[object], *, cards: bool = True) -> Outcome:
    """The check of training steps with a mock of the workload, and of nvidia-smi where there are `cards`."""
    (tmp_path / "source/workload").mkdir(parents=True)
    (tmp_path / "source/workload/__init__.py").touch()
    (tmp_path / "source/workload/__main__.py").write_text(BENCH)
    listing = "\n".join(f"echo 'GPU {index}: NVIDIA X (UUID: GPU-{index})'" for index in range(len(answers)))
    path = programs(tmp_path / "bin", **{"nvidia-smi": listing if cards else "echo no driver; exit 9"})
    check = here(training_speed(PurePosixPath(tmp_path / "source")))
    return run([check], PATH=path, BENCH=json.dumps(answers))[0]


def test_every_card_trains_as_fast_as_it_should(tmp_path: Path) -> None:
    outcome = bench(
        tmp_path, [{"tokens_per_s": 180000.0, "mfu": 0.45}, {"tokens_per_s": 178000.0, "mfu": 0.445}]
    )
    assert outcome.good, outcome.seen
    assert "NVIDIA X, bfloat16: 180,000 tokens/s" in outcome.seen
    assert "45% of its peak; 120,000 expected" in outcome.seen
    assert outcome.figures["card1_tokens_per_s"] == 178000
    assert outcome.figures["card0_mfu"] == 0.45


def test_a_card_that_is_too_slow(tmp_path: Path) -> None:
    outcome = bench(
        tmp_path, [{"tokens_per_s": 180000.0, "mfu": 0.45}, {"tokens_per_s": 40000.0, "mfu": 0.1}]
    )
    bad(outcome, "10% of its peak; less than half of the 120,000 expected", "See load")


def test_without_torch_compile_a_slow_card_has_another_remedy(tmp_path: Path) -> None:
    outcome = bench(tmp_path, [{"tokens_per_s": 40000.0, "mfu": 0.1, "compiled": False}])
    bad(outcome, "torch.compile failed", "without torch.compile")


@pytest.mark.parametrize(
    ("said", "remedy"),
    [
        (
            "error: 16 sequences of 1024 tokens do not fit the memory of cuda",
            "Something else holds the card's memory",
        ),
        ("ModuleNotFoundError: No module named 'tiktoken'", "fab provision makes it anew"),
        ("something else", "python -m workload bench"),
    ],
)
def test_steps_that_fail(tmp_path: Path, said: str, remedy: str) -> None:
    bad(bench(tmp_path, [said]), f"card 0: {said}", remedy)


def test_a_card_whose_peak_is_not_known_and_a_processor(tmp_path: Path) -> None:
    outcome = bench(tmp_path, [{"tokens_per_s": 4000.0, "mfu": None}], cards=False)
    assert outcome.good
    assert outcome.figures == {"tokens_per_s": 4000}
    assert "what it should do is not known" in outcome.seen


# --- load ------------------------------------------------------------------------------------------------------------


def test_a_processor_under_load() -> None:
    outcome = run([here(load(2))])[0]
    assert outcome.good, outcome.seen
    assert outcome.seen.startswith("processor: ")
    assert outcome.figures["load_tflops"] > 0


def test_a_product_that_comes_out_differently_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """A fault that is put into the products, as a memory that fails when hot."""
    program = module("load")
    worker = program.Worker(torch.device("cpu"))
    assert worker.work(0)[1] < 1e-6
    worker.right[3, 5] = 1e3
    assert worker.work(0)[1] > 0.01
    worker.right[3, 5] = float("nan")
    assert worker.work(0)[1] == float("inf")


def test_what_breaks_off_is_not_well(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As a card does that leaves the bus after some good seconds; the error is put in, for there is no card here."""
    program = module("load")
    turns = iter([1.0] * 5)

    def work(self: object, until: float) -> tuple[float, float]:
        if (rate := next(turns, None)) is None:
            raise RuntimeError("CUDA error: unspecified launch failure\nMore of it")
        return rate, 0.0

    monkeypatch.setattr(program.Worker, "work", work)
    for seen in ("1 TFLOP/s", "cpu"):  # the second breaks off at once
        assert program.main(600) == 1
        said = capsys.readouterr().out
        assert seen in said
        assert "it broke off: CUDA error: unspecified launch failure\n" in said
        assert "fails under load" in load(60).remedy_for(said)


@pytest.mark.parametrize(
    ("line", "changes", "seen", "remedy"),
    [
        ("0, 64, 412.10, 1980, 16, 16, 0x0000000000000004", {}, "at most 64 °C and 412 W", ""),
        ("0, 64, [N/A], 1980, 16, 16, 0x0000000000000000", {}, "at most 64 °C", ""),
        ("0, 92, 300, 900, 16, 16, 0x0000000000000040", {}, "too hot, by the hardware", "fans"),
        ("0, 60, 300, 900, 16, 16, 0x0000000000000008", {}, "the hardware slows it down", "cables and power supply"),
        ("0, 90, 300, 900, 16, 16, 0x0000000000000020", {}, "too hot, by the driver", "fans"),
        ("0, 60, 300, 900, 16, 16, 0x0000000000000080", {}, "the power supply brakes it", "too little power"),
        ("0, 60, 300, 1980, 4, 16, 0x0000000000000000", {}, "only 4 of 16 PCIe lanes", "too few lanes"),
        ("0, 60, 300, 900, 16, 16, 0x0000000000000000", {"tflops": [100.0] * 4 + [70.0] * 4}, "its speed fell from 100", "slows down when warm"),
        ("0, 60, 300, 900, 16, 16, 0x0000000000000000", {"wrong": 0.5}, "came out differently, by 0.5", "computes wrongly when hot"),
    ],
)  # fmt: skip
def test_what_a_card_says_under_load(line: str, changes: dict[str, object], seen: str, remedy: str) -> None:
    """Lines as nvidia-smi writes them; there is no card here that could."""
    program = module("load")
    cards = {0: program.Seen(tflops=[100.0] * 8)}
    program.take_sample(cards, "2, 99, 999, 1, 1, 16, 0x80")  # another card's
    program.take_sample(cards, "No devices were found")
    program.take_sample(cards, line)
    for name, value in changes.items():
        setattr(cards[0], name, value)
    said, good = program.judge("NVIDIA X", cards[0], alone=True)
    assert good is (remedy == "")
    assert seen in said
    assert remedy in load(60).remedy_for(said)


def test_what_a_slower_processor_is_not_blamed_for() -> None:
    program = module("load")
    assert program.judge("processor", program.Seen(tflops=[1.0] * 4 + [0.5] * 4), alone=False)[1]
