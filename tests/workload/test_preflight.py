"""What a run will need, as numbers."""

import dataclasses
from pathlib import Path

import pytest

from workload.config import TrainConfig
from workload.errors import WorkloadError
from workload.preflight import (
    Disk,
    check_disk,
    count_kept,
    format_bytes,
    measure_disk,
    render_disk,
    render_pace,
)

GB = 10**9


def test_checkpoints_on_the_disk_at_a_time() -> None:
    train = TrainConfig(keep=2)
    assert count_kept(train, 19073) == 4  # two newest, the best, the one being written
    assert count_kept(dataclasses.replace(train, keep_every=5000), 19073) == 7


def test_a_disk_that_cannot_hold_them_is_refused_with_the_figures(tmp_path: Path) -> None:
    check_disk(tmp_path, Disk(GB, 4, 4 * GB))
    with pytest.raises(WorkloadError) as caught:
        check_disk(tmp_path, Disk(1_500_000_000, 4, 5 * GB))
    assert f"{tmp_path}: up to 4 checkpoints of 1.5 GB each need 6.0 GB, but 5.0 GB are free" == (
        caught.value.message
    )
    assert "train.keep=1" in caught.value.hint


def test_what_is_there_already_is_not_needed_again(tmp_path: Path) -> None:
    missing = tmp_path / "runs" / "one" / "checkpoints"
    before = measure_disk(missing, TrainConfig(), 10, checkpoint_bytes=GB)
    assert before.free_bytes > 0
    (tmp_path / "step-00000001").mkdir()
    (tmp_path / "step-00000001" / "model.safetensors").write_bytes(bytes(3_000_000))
    with_one = measure_disk(tmp_path, TrainConfig(), 10, checkpoint_bytes=GB)
    without = measure_disk(tmp_path / "empty", TrainConfig(), 10, checkpoint_bytes=GB)
    # other programs write, too: only roughly
    assert with_one.free_bytes - without.free_bytes == pytest.approx(3_000_000, abs=2_000_000)


def test_words() -> None:
    assert render_pace(tokens_per_s=123456.7, mfu=0.4321, eta_s=3723, steps_left=1000) == (
        "123,457 tokens/s, 43.2% of the device's peak (MFU): 1,000 steps more take 1:02:03"
    )
    assert (
        render_pace(tokens_per_s=12, mfu=None, eta_s=5, steps_left=3) == "12 tokens/s: 3 steps more take 0:05"
    )
    assert render_disk(Disk(GB, 4, 120 * GB)) == "up to 4 checkpoints of 1.0 GB are 4.0 GB; 120.0 GB are free"
    assert [format_bytes(n) for n in (812, 30_499, 999_600, 1.5e9)] == ["812 B", "30 kB", "1 MB", "1.5 GB"]
