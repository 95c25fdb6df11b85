"""Shards and the order in which a run sees them."""

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from workload.data import (
    MAGIC,
    MAGIC_LLAMA,
    Windows,
    check_tokens,
    cut,
    load_shard,
    load_split,
    render_header,
    share,
    shuffle,
    spread,
)
from workload.errors import WorkloadError


def numbered(*lengths: int) -> list[np.ndarray]:
    """Shards in which every token is different, as far as uint16 goes."""
    tokens = np.arange(sum(lengths), dtype=np.uint16)
    return np.split(tokens, np.cumsum(lengths)[:-1])


@given(st.integers(1, 3000), st.integers(0, 2**64))
def test_shuffle_is_a_permutation(n: int, key: int) -> None:
    assert sorted(shuffle(np.arange(n, dtype=np.uint64), n, key).tolist()) == list(range(n))


def test_shuffle_mixes_and_depends_on_its_key() -> None:
    index = np.arange(1000, dtype=np.uint64)
    one, other = shuffle(index, 1000, 1), shuffle(index, 1000, 2)
    assert not np.array_equal(one, other)
    assert abs(np.corrcoef(index, one)[0, 1]) < 0.1
    assert np.mean(np.diff(one.astype(np.int64)) == 1) < 0.02
    # golden, so that a run begun with one version goes on in the same order with the next
    assert shuffle(np.arange(8, dtype=np.uint64), 8, 7).tolist() == [0, 5, 1, 6, 7, 2, 3, 4]


@settings(deadline=None)
@given(
    st.lists(st.integers(0, 200), min_size=1, max_size=4),
    st.integers(1, 40),
    st.integers(0, 9),
    st.integers(0, 3),
)
def test_every_window_once_an_epoch_without_overlap(
    lengths: list[int], n_ctx: int, seed: int, epoch: int
) -> None:
    shards = numbered(*lengths)
    if max(lengths) <= n_ctx:
        with pytest.raises(WorkloadError, match=f"needs {n_ctx + 1} tokens"):
            Windows(shards, n_ctx, seed)
        return
    windows = Windows(shards, n_ctx, seed)
    places = windows.places(epoch * windows.n, windows.n)
    assert len(set(places)) == windows.n
    for shard, length in enumerate(lengths):
        offsets = sorted(offset for s, offset in places if s == shard)
        assert all(b - a == n_ctx for a, b in pairwise(offsets))
        if offsets:
            assert offsets[0] >= 0
            assert offsets[-1] + n_ctx + 1 <= length  # the token after the last is in the same shard
            assert length - len(offsets) * n_ctx < max(2 * n_ctx, n_ctx + 1)
    batch = windows.batch(epoch * windows.n, windows.n)
    assert batch.shape == (windows.n, n_ctx + 1)
    assert bool((np.diff(batch) == 1).all())  # neighbours in the text


@given(st.integers(0, 200), st.integers(1, 60), st.integers(1, 60))
def test_the_order_does_not_depend_on_batches(first: int, a: int, b: int) -> None:
    windows = Windows(numbered(300, 100), 7, seed=3)
    assert windows.places(first, a) + windows.places(first + a, b) == windows.places(first, a + b)


def test_epochs_and_seeds_differ() -> None:
    shards = numbered(5000)
    one = Windows(shards, 16, seed=1)
    assert one.places(0, one.n) != one.places(one.n, one.n)
    assert {o % 16 for _, o in one.places(0, one.n)} != {o % 16 for _, o in one.places(one.n, one.n)}
    assert one.places(0, 20) != Windows(shards, 16, seed=2).places(0, 20)


def test_validation_windows_are_spread_evenly_and_always_the_same() -> None:
    shards = numbered(100, 5, 61)
    every = spread(shards, 10, 0)
    assert every == [(0, 10 * i) for i in range(9)] + [(2, 10 * i) for i in range(6)]
    assert spread(shards, 10, 5) == [every[i] for i in (0, 3, 6, 9, 12)]
    assert spread(shards, 10, 99) == every
    assert cut(shards, every[-1:], 10).tolist() == [list(range(155, 166))]


def test_a_shard_is_llm_cs(tmp_path: Path) -> None:
    path = tmp_path / "train_000000.bin"
    path.write_bytes(render_header(3) + np.array([1, 256, 65535], dtype="<u2").tobytes())
    raw = path.read_bytes()
    assert raw[:12] == (20240520).to_bytes(4, "little") + (1).to_bytes(4, "little") + (3).to_bytes(
        4, "little"
    )
    assert len(raw) == 1024 + 6
    tokens = load_shard(path)
    assert isinstance(tokens, np.memmap)
    assert tokens.tolist() == [1, 256, 65535]


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"", "too short for the header"),
        (render_header(0)[:1000], "too short for the header"),
        (b"\x00" * 1024, "magic 0, version 0"),
        (render_header(3)[:4] + b"\x02" + render_header(3)[5:] + b"\x00" * 6, "version 2"),
        (render_header(3) + b"\x00" * 4, "its header says 3 tokens, 1030 bytes; it has 1028 bytes"),
        (render_header(3) + b"\x00" * 8, "it has 1032 bytes"),
        (render_header(-1), "its header says -1 tokens"),
    ],
)
def test_damaged_shards_are_refused(tmp_path: Path, content: bytes, complaint: str) -> None:
    (tmp_path / "val_000000.bin").write_bytes(content)
    with pytest.raises(WorkloadError) as caught:
        load_split(tmp_path, "val")
    assert complaint in caught.value.message
    assert "val_000000.bin" in caught.value.message


def test_a_folder_without_shards_is_refused(tmp_path: Path) -> None:
    with pytest.raises(WorkloadError, match=r"no train_\*\.bin"):
        load_split(tmp_path, "train")


def test_an_empty_shard_is_a_shard(tmp_path: Path) -> None:
    (tmp_path / "x_train_000001.bin").write_bytes(render_header(0))
    assert [len(shard) for shard in load_split(tmp_path, "train")] == [0]


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 6), st.integers(1, 5), st.integers(0, 400), st.integers(0, 3))
def test_ranks_share_every_step_without_overlap(world: int, each: int, step: int, seed: int) -> None:
    windows, count = Windows(numbered(700, 90, 3), 9, seed), world * each
    parts = [windows.batch(step * count, count, rank, world) for rank in range(world)]
    assert all(len(part) == each for part in parts)
    assert np.array_equal(np.concatenate(parts), windows.batch(step * count, count))  # whatever the world


def test_each_window_is_seen_by_one_rank_once_an_epoch() -> None:
    windows, world = Windows(numbered(2000, 61), 10, 5), 3
    steps = -(-windows.n // 6)
    seen = [
        [windows.places(*share(step * 6, 6, rank, world)) for step in range(steps)] for rank in range(world)
    ]
    everything = [place for step in range(steps) for rank in range(world) for place in seen[rank][step]]
    assert len(everything) >= windows.n
    assert len(set(everything[: windows.n])) == windows.n
    assert sorted(everything[: windows.n]) == sorted(windows.places(0, windows.n))


def test_a_step_that_ranks_cannot_share_is_refused() -> None:
    with pytest.raises(WorkloadError, match="12 sequences a step cannot be shared by 5 ranks"):
        share(0, 12, 0, 5)


def test_a_shard_of_exactly_one_window_has_one() -> None:
    windows = Windows(numbered(11, 10, 0, 11), 10, seed=1)
    assert sorted(windows.places(0, windows.n)) == [(0, 0), (3, 0)]


def test_nanogpts_files_have_no_header(tmp_path: Path) -> None:
    tokens = np.array([50256, 0, 0, 65535, *range(40)], dtype="<u2")
    for split in ("train", "val"):
        tokens.tofile(tmp_path / f"{split}.bin")
        (shard,) = load_split(tmp_path, split)
        assert isinstance(shard, np.memmap)
        assert shard.tolist() == tokens.tolist()


@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.int64, np.uint32, np.uint8, np.int16])
def test_tensors_of_whole_numbers_are_tokens(tmp_path: Path, dtype: type) -> None:
    """The file is written by the safetensors library, read by our own parser."""
    tokens = (np.arange(101) % 128).astype(dtype)
    save_file({"before": np.zeros(3, np.uint8), "tokens": tokens}, tmp_path / "train.safetensors")
    (shard,) = load_split(tmp_path, "train")
    assert isinstance(shard, np.memmap)
    assert shard.tolist() == tokens.tolist()
    batch = Windows([shard], 10, 1).batch(0, 4)
    assert batch.dtype == np.int64
    assert bool((np.diff(batch) == 1).all())


def refused(folder: Path, split: str = "train") -> str:
    with pytest.raises(WorkloadError) as caught:
        load_split(folder, split)
    return caught.value.message


def test_tensors_that_are_not_tokens_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "train.safetensors"
    save_file({"weight": np.zeros(3, np.float32), "bias": np.zeros(3, np.float32)}, path)
    assert "there is no tensor tokens in it; it holds bias, weight" in refused(tmp_path)
    save_file({"tokens": np.zeros(3, np.float32)}, path)
    assert "tokens is F32 of shape [3]" in refused(tmp_path)
    save_file({"tokens": np.zeros((3, 2), np.int32)}, path)
    assert "tokens is I32 of shape [3, 2]" in refused(tmp_path)
    save_file({"tokens": np.zeros(100, np.int32)}, path)
    whole = path.read_bytes()
    path.write_bytes(whole[:-4])
    assert f"100 numbers that end at byte {len(whole)}; the file has {len(whole) - 4}" in refused(tmp_path)
    for damage in (b"", whole[:7], whole[:40], b"\xff" * 8 + whole[8:], whole[:8] + b"[" * 64 + whole[72:]):
        path.write_bytes(damage)
        assert "not a safetensors file" in refused(tmp_path)


def test_shards_of_other_formats_are_named(tmp_path: Path) -> None:
    path = tmp_path / "tiny_train.bin"
    llama = np.zeros(256, "<i4")
    llama[:3] = MAGIC_LLAMA, 7, 2
    path.write_bytes(llama.tobytes() + np.array([128000, 9], "<u4").tobytes())
    assert "Llama 3's tokens of 32 bits" in refused(tmp_path)
    later = np.zeros(256, "<i4")
    later[:3] = MAGIC, 2, 0
    path.write_bytes(later.tobytes())
    assert f"magic {MAGIC}, version 2" in refused(tmp_path)
    path.write_bytes(render_header(9)[:500])
    assert "500 bytes, too short for the header" in refused(tmp_path)  # its magic says what it began as
    path.write_bytes(b"\x01\x00\x02")
    assert "3 bytes are not whole tokens" in refused(tmp_path)
    for wide in ("<i4", "<i8"):
        np.arange(1000).astype(wide).tofile(path)
        assert "numbers of 32 or 64 bits" in refused(tmp_path)
    path.write_bytes(render_header(2) + b"\x01\x00\x02\x00")
    assert load_split(tmp_path, "train")[0].tolist() == [1, 2]


@pytest.mark.parametrize(
    "names",
    [
        ("train.bin", "train_000000.bin"),
        ("train.bin", "train.safetensors"),
        ("a_train_000001.bin", "b_train_000001.bin"),
        ("a_train_000001.bin", "b_val_000000.bin"),
    ],
)
def test_a_folder_of_two_sets_is_refused(tmp_path: Path, names: tuple[str, str]) -> None:
    for name in names:
        (tmp_path / name).write_bytes(render_header(0))
    assert f"tokens of 2 kinds: {', '.join(names)}" in refused(tmp_path)


def test_other_names_are_not_token_files(tmp_path: Path) -> None:
    for name in (
        "strain_000000.bin",
        "retrain.bin",
        "eval_000000.bin",
        "train.txt",
        "train_x.bin",
        "meta.json",
    ):
        (tmp_path / name).write_bytes(b"?")
    assert "no train_*.bin" in refused(tmp_path)
    (tmp_path / "fineweb_train_000001.bin").write_bytes(render_header(0))
    assert len(load_split(tmp_path, "train")) == 1


def test_a_token_outside_the_vocabulary_is_found_at_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("workload.data.SCAN_TOKENS", 100)
    path = tmp_path / "train_000000.bin"
    tokens = np.full(1000, 50256, "<u2")
    path.write_bytes(render_header(1000) + tokens.tobytes())
    assert check_tokens(path, 50257) == 50256
    tokens[777:] = 50300
    path.write_bytes(render_header(1000) + tokens.tobytes())
    with pytest.raises(WorkloadError, match=r"token 50300 at position 777; the vocabulary has 0 … 50256"):
        check_tokens(path, 50257)
    signed = tmp_path / "val.safetensors"
    save_file({"tokens": np.array([5, 256, -100, 257], np.int64)}, signed)
    with pytest.raises(WorkloadError, match="token -100 at position 2"):
        check_tokens(signed, 257)
    path.write_bytes(render_header(0))
    assert check_tokens(path, 257) == -1
