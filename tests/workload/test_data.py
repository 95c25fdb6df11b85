"""Shards and the order in which a run sees them."""

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from workload.data import Windows, cut, load_shard, load_split, render_header, shuffle, spread
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
