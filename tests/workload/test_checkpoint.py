"""Complete or not there, whatever happens while one is written."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.workload.conftest import raise_at
from workload import checkpoint
from workload.checkpoint import State, find, list_complete, load, point, prune, save, verify
from workload.config import Config, load_config
from workload.errors import WorkloadError

CONFIG = load_config("demo")


class Crash(BaseException):
    """As good as a power cut: nothing in the package catches it."""


def state_of(step: int) -> State:
    return State(step=step, steps=9, sequences=step * 4, best_val_loss=None, elapsed_s=1.5, metrics_bytes=10)


def save_step(folder: Path, step: int, config: Config = CONFIG) -> Path:
    tensors = {"a": torch.full((3, 2), float(step)), "b": torch.arange(4)}
    moments = {"exp_avg/a": torch.ones(3, 2) * step}
    random = {"cpu": torch.get_rng_state()}
    return save(folder, config, state_of(step), model=tensors, optimizer=moments, random=random)


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    path = save_step(tmp_path, 2)
    assert path.name == "step-00000002"
    assert (tmp_path / "latest").read_text() == "step-00000002\n"
    saved = load(path)
    assert (saved.config, saved.state) == (CONFIG, state_of(2))
    assert torch.equal(saved.model["a"], torch.full((3, 2), 2.0))
    assert torch.equal(saved.model["b"], torch.arange(4))
    assert torch.equal(saved.optimizer["exp_avg/a"], torch.ones(3, 2) * 2)
    assert torch.equal(saved.random["cpu"], torch.get_rng_state())
    only = load(path, only_model=True)
    assert only.optimizer == {}
    manifest = json.loads((path / "manifest.json").read_text())
    assert (manifest["format"], manifest["step"]) == (1, 2)
    assert set(manifest["files"]) == {p.name for p in path.iterdir()} - {"manifest.json"}
    assert manifest["files"]["model.safetensors"]["bytes"] == (path / "model.safetensors").stat().st_size


def crash_at(monkeypatch: pytest.MonkeyPatch, nth: int) -> Callable[[], int]:
    """Every operation on the file system that saving uses counts; the nth raises instead. Returns the counter."""
    return raise_at(monkeypatch, nth, Crash("here"))


def test_a_crash_at_any_moment_of_saving_leaves_the_last_good_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def save_and_prune(folder: Path) -> None:
        save_step(folder, 3)
        prune(folder, keep=1, keep_every=0)

    def prepared(name: str) -> Path:
        folder = tmp_path / name
        save_step(folder, 1)
        save_step(folder, 2)
        point(folder, "best", "step-00000001")
        (folder / ".step-00000003.partial").mkdir()  # of an earlier crash
        return folder

    whole = prepared("whole")
    with monkeypatch.context() as patch:
        operations = crash_at(patch, nth=0)
        save_and_prune(whole)
        total = operations()
    assert total > 15
    assert [path.name for path in list_complete(whole)] == ["step-00000001", "step-00000003"]
    assert not list(whole.glob(".*partial"))

    outcomes = set()
    for nth in range(1, total + 1):
        folder = prepared(f"crash-{nth}")
        with monkeypatch.context() as patch:
            crash_at(patch, nth)
            with pytest.raises(Crash):
                save_and_prune(folder)
        newest = list_complete(folder)[-1]
        saved = load(newest)  # verifies
        assert saved.state.step == float(saved.model["a"][0, 0]) == int(newest.name[-1]) >= 2
        load(find(folder, "best"))
        load(find(folder, "latest"))
        outcomes.add(newest.name)
        save_and_prune(folder)  # and the next attempt cleans up
        assert [path.name for path in list_complete(folder)] == ["step-00000001", "step-00000003"]
        assert {path.name for path in folder.iterdir()} == {
            "step-00000001",
            "step-00000003",
            "latest",
            "best",
        }
    assert outcomes == {"step-00000002", "step-00000003"}  # some crashes came before the rename, some after


def test_a_complete_checkpoint_is_never_written_again(tmp_path: Path) -> None:
    first = save_step(tmp_path, 1)
    before = {path.name: path.stat().st_mtime_ns for path in first.iterdir()}
    save_step(tmp_path, 2)
    assert save_step(tmp_path, 1) == first
    assert {path.name: path.stat().st_mtime_ns for path in first.iterdir()} == before
    assert (tmp_path / "latest").read_text() == "step-00000001\n"


def test_pruning_keeps_what_the_policy_says(tmp_path: Path) -> None:
    for step in range(1, 8):
        save_step(tmp_path, step)
    point(tmp_path, "best", "step-00000002")
    removed = prune(tmp_path, keep=2, keep_every=3)
    assert [int(path.name[-1]) for path in removed] == [1, 4, 5]
    assert [int(path.name[-1]) for path in list_complete(tmp_path)] == [2, 3, 6, 7]
    assert prune(tmp_path, keep=2, keep_every=3) == []


@pytest.mark.parametrize(
    "name", ["model.safetensors", "optimizer.safetensors", "random.safetensors", "state.json"]
)
def test_damage_is_found_and_named(tmp_path: Path, name: str) -> None:
    path = save_step(tmp_path, 1)
    whole = (path / name).read_bytes()

    def complaint() -> str:
        with pytest.raises(WorkloadError) as caught:
            load(path)
        assert name in caught.value.message
        assert caught.value.hint
        return caught.value.message

    (path / name).write_bytes(whole[:-1])
    assert f"{len(whole) - 1} bytes, but {len(whole)} were written" in complaint()
    (path / name).write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    assert "sha256 is not the manifest's" in complaint()
    (path / name).unlink()
    assert "is missing" in complaint()


@pytest.mark.parametrize("manifest", ["", "{}", "[]", '{"format": 1, "files": {"x": 3}}'])
def test_a_damaged_manifest_is_refused(tmp_path: Path, manifest: str) -> None:
    path = save_step(tmp_path, 1)
    (path / "manifest.json").write_text(manifest)
    with pytest.raises(WorkloadError, match=r"manifest\.json cannot be read"):
        verify(path)


def test_a_later_format_is_refused(tmp_path: Path) -> None:
    path = save_step(tmp_path, 1)
    manifest = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps(manifest | {"format": 2}))
    with pytest.raises(WorkloadError, match="format 2; this version reads format 1"):
        load(path)


def test_a_checkpoint_is_found_from_what_a_person_names(tmp_path: Path) -> None:
    folder = tmp_path / "run" / "checkpoints"
    paths = [save_step(folder, step) for step in (1, 2, 3)]
    assert find(paths[0]) == paths[0]
    assert find(tmp_path / "run") == find(folder) == paths[2]  # no best yet: the newest
    point(folder, "best", paths[1].name)
    assert find(tmp_path / "run") == paths[1]
    assert find(tmp_path / "run", "latest") == paths[2]
    assert find(tmp_path / "run", "1") == paths[0]
    with pytest.raises(WorkloadError, match="no checkpoint of step 7") as caught:
        find(tmp_path / "run", "7")
    assert "1, 2, 3" in caught.value.hint
    (paths[2] / "manifest.json").unlink()  # latest names one that is not complete: it does not exist
    assert find(tmp_path / "run", "latest") == paths[1]
    with pytest.raises(WorkloadError, match="neither a complete checkpoint nor a run"):
        find(tmp_path)


def test_generators_come_back() -> None:
    states: dict[str, Tensor] = checkpoint.gather_random(torch.device("cpu"))
    first = torch.rand(3)
    checkpoint.restore_random(states, torch.device("cpu"))
    assert torch.equal(torch.rand(3), first)


def test_generators_of_other_devices_and_ranks_are_left_alone() -> None:
    device = torch.device("cpu")
    states = checkpoint.gather_random(device)
    first = torch.rand(3)
    other = torch.zeros(16, dtype=torch.uint8)
    checkpoint.restore_random(states | {"cuda": other, "cpu/1": other, "cuda/1": other}, device)
    assert torch.equal(torch.rand(3), first)
