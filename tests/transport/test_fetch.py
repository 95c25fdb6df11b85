"""Checkpoints home, over a real sshd and a real rsync: what is complete, whole and missing; nothing else."""

import fcntl
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import textwrap
from base64 import b64encode
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import pytest

from provision import fetch
from provision.errors import ConnectionLost, ProvisionError
from provision.fetch import Fetched, parse_listing, parse_manifest
from provision.host import Host, connect
from tests.sshd import Proxy, Sshd, wait_for

RUNS = "/run/home/ml/metal/runs"
BIG = 24_000_000  # bytes: enough for a fetch to be caught in the middle


@pytest.fixture
def host(sshd: Sshd, proxy: Proxy) -> Iterator[Host]:
    sshd.pin()
    with connect(sshd.machine(port=proxy.port), sshd.pins) as session:
        yield session


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """Where checkpoints come to."""
    folder = tmp_path / "home"
    folder.mkdir()
    return folder


def save(sshd: Sshd, run: str, step: int, *, size: int = 1000, seed: int = 0, **changes: object) -> Path:
    """A checkpoint on the machine as the workload leaves it; `changes` replace fields of its manifest."""
    folder = sshd.path(f"{RUNS}/{run}/checkpoints/step-{step:08d}")
    folder.mkdir(parents=True)
    bytes_of = random.Random(f"{run} {step} {seed}").randbytes
    contents = {"model.safetensors": bytes_of(size), "state.json": b"{}", "empty": b""}
    for name, data in contents.items():
        (folder / name).write_bytes(data)
    files = {
        name: {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        for name, data in contents.items()
    }
    (folder / "manifest.json").write_text(json.dumps({"format": 1, "step": step, "files": files} | changes))
    (folder.parent / "latest").write_text(folder.name + "\n")
    with (folder.parent.parent / "metrics.jsonl").open("a") as metrics:
        metrics.write(f"step {step}\n")
    subprocess.run(["chown", "-R", "4242:4242", sshd.path("/run/home/ml")], check=True)
    return folder


def get(host: Host, home: Path, run: str = "", said: list[str] | None = None) -> Fetched:
    return fetch.fetch_checkpoints(
        host, host.wanted.machine, home, run, say=(said if said is not None else []).append
    )


def tree(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def refused(host: Host, home: Path, run: str = "") -> ProvisionError:
    with pytest.raises(ProvisionError) as caught:
        get(host, home, run)
    return caught.value


# What comes


def test_what_is_complete_comes_home_byte_for_byte(host: Host, sshd: Sshd, home: Path) -> None:
    for run, step in (("a-1", 100), ("a-1", 200), ("b-2", 100)):
        save(sshd, run, step)
    there = sshd.path(RUNS)
    (there / "a-1/checkpoints/best").write_text("step-00000100\n")
    (there / "a-1/config.toml").write_text("[model]\n")
    (there / "a-1/report.html").write_text("<html>\n")
    before = tree(there)
    (there / "a-1/data").mkdir()
    (there / "a-1/data/train-0.bin").write_bytes(b"not for home")
    (there / "a-1/log").write_bytes(b"not for home")
    unfinished = there / "a-1/checkpoints/.step-00000300.partial"
    shutil.copytree(there / "a-1/checkpoints/step-00000200", unfinished)
    without_manifest = there / "a-1/checkpoints/step-00000400"
    without_manifest.mkdir()
    (without_manifest / "model.safetensors").write_bytes(b"half")
    said: list[str] = []
    done = get(host, home, said=said)
    assert tree(home) == before
    assert (len(done.moved), done.here, done.execs) == (3, 3, 2)
    assert "3 fetched" in said[-1]
    assert f"{home}/a-1/checkpoints/step-00000200" in said[-1]


def test_a_second_fetch_is_one_exec_and_moves_nothing(
    host: Host, sshd: Sshd, proxy: Proxy, home: Path
) -> None:
    save(sshd, "a-1", 100, size=1_000_000)
    get(host, home)
    times = {path: path.stat().st_mtime_ns for path in home.rglob("*")}
    said: list[str] = []
    connections, relayed = proxy.accepted, proxy.relayed_bytes
    done = get(host, home, said=said)
    assert (done.moved, done.here, done.execs) == ((), 1, 1)
    assert proxy.accepted == connections, "rsync was not started"
    assert proxy.relayed_bytes - relayed < 20_000
    assert said == [
        f"Nothing to fetch: all 1 checkpoints of box are in {home} (1 exec, {fetch.human(done.bytes_received)} received)."
    ]
    assert {path: path.stat().st_mtime_ns for path in home.rglob("*")} == times


def test_only_what_is_new_moves_and_the_rest_follows(host: Host, sshd: Sshd, home: Path) -> None:
    save(sshd, "a-1", 100, size=3_000_000)
    get(host, home)
    save(sshd, "a-1", 200)
    done = get(host, home)
    assert done.moved == (PurePosixPath("a-1/checkpoints/step-00000200"),)
    assert done.bytes_received < 100_000
    assert (home / "a-1/checkpoints/latest").read_text() == "step-00000200\n"
    assert (home / "a-1/metrics.jsonl").read_text() == "step 100\nstep 200\n"


def test_what_the_host_prunes_stays_at_home(host: Host, sshd: Sshd, home: Path) -> None:
    folder = save(sshd, "a-1", 100)
    get(host, home)
    shutil.rmtree(folder)
    save(sshd, "a-1", 200)
    get(host, home)
    assert sorted(path.name for path in (home / "a-1/checkpoints").iterdir()) == [
        "latest",
        "step-00000100",
        "step-00000200",
    ]


def test_one_run_only(host: Host, sshd: Sshd, home: Path) -> None:
    save(sshd, "a-1", 100)
    save(sshd, "b-2", 100)
    get(host, home, "b-2")
    assert [path.name for path in home.iterdir()] == ["b-2"]
    assert "There is no run c-3 on box" in refused(host, home, "c-3").message
    assert "not the id of a run" in refused(host, home, "../b-2").message


def test_which_checkpoints(host: Host, sshd: Sshd, home: Path) -> None:
    for step in (100, 200, 300):
        save(sshd, "a-1", step)
    save(sshd, "b-2", 100)
    best = sshd.path(f"{RUNS}/a-1/checkpoints/best")
    best.write_text("step-00000200\n")

    def fetched(which: str) -> set[str]:
        fetch.fetch_checkpoints(host, host.wanted.machine, home, "a-1", which, say=lambda text: None)
        names = {path.name for path in (home / "a-1/checkpoints").glob("step-*")}
        for path in (home / "a-1/checkpoints").iterdir():
            path.unlink() if path.is_file() else shutil.rmtree(path)
        return names

    assert fetched("latest") == {"step-00000300"}
    assert fetched("best") == {"step-00000200"}
    assert fetched("100") == {"step-00000100"}
    assert fetched("all") == {"step-00000100", "step-00000200", "step-00000300"}
    best.unlink()
    assert fetched("best") == {"step-00000300"}, "without that pointer the newest"
    with pytest.raises(
        ProvisionError, match="no checkpoint of step 150 on box; it keeps those of steps 100, 200, 300"
    ):
        fetched("150")
    with pytest.raises(ProvisionError, match="expected all, latest, best, or a step"):
        fetched("newest")


def test_no_run_and_no_checkpoint_yet(host: Host, sshd: Sshd, home: Path) -> None:
    error = refused(host, home)
    assert "no run on box yet" in error.message
    assert error.hint == "fab -H box train"
    sshd.path(f"{RUNS}/a-1/checkpoints").mkdir(parents=True)
    said: list[str] = []
    assert get(host, home, said=said).here == 0
    assert "No run on box has a complete checkpoint yet" in said[0]


def test_a_local_checkpoint_that_lost_a_file_is_fetched_again(host: Host, sshd: Sshd, home: Path) -> None:
    save(sshd, "a-1", 100)
    get(host, home)
    before = tree(home)
    (home / "a-1/checkpoints/step-00000100/state.json").unlink()
    assert len(get(host, home).moved) == 1
    assert tree(home) == before


def test_another_checkpoint_under_the_same_name_replaces_it(host: Host, sshd: Sshd, home: Path) -> None:
    folder = save(sshd, "a-1", 100)
    get(host, home)
    shutil.rmtree(folder)
    save(sshd, "a-1", 100, seed=1)
    assert len(get(host, home).moved) == 1
    assert tree(home / "a-1/checkpoints") == tree(folder.parent)


# What is interrupted


def test_a_cut_connection_keeps_what_came_and_the_next_fetch_goes_on(
    host: Host, sshd: Sshd, proxy: Proxy, home: Path
) -> None:
    save(sshd, "a-1", 100, size=BIG)
    proxy.cut_after_bytes = proxy.relayed_bytes + BIG // 2
    with pytest.raises(ConnectionLost) as caught:
        get(host, home)
    assert "goes on where it stopped" in caught.value.hint
    assert not (home / "a-1").exists(), "nothing half under its final name"
    staged = home / ".staging/a-1/checkpoints/step-00000100/model.safetensors"
    assert 0 < staged.stat().st_size < BIG
    arrived = staged.stat().st_size
    done = get(host, home)
    assert done.here == 1
    assert done.bytes_received < BIG - arrived + 500_000
    assert tree(home) == tree(sshd.path(RUNS))


CLIENT = """
    import sys
    from pathlib import Path
    from provision.fetch import fetch_checkpoints
    from provision.host import connect
    from provision.machine import load_machine
    machine = load_machine("box", Path({machines!r}))
    host = connect(machine, Path({pins!r}), key_files=[{identity!r}])
    fetch_checkpoints(host, machine, Path({home!r}))
"""


def test_a_killed_fetch_goes_on(host: Host, sshd: Sshd, home: Path) -> None:
    """The whole process group is killed, as by a power cut; what is staged is what the kernel had."""
    save(sshd, "a-1", 100, size=BIG * 4)
    save(sshd, "a-1", 200)
    code = textwrap.dedent(CLIENT).format(
        machines=str(sshd.pins.parent), pins=str(sshd.pins), identity=str(sshd.identity), home=str(home)
    )
    client = subprocess.Popen([sys.executable, "-c", code], start_new_session=True)
    staged = home / ".staging/a-1/checkpoints/step-00000100/model.safetensors"
    wait_for(lambda: staged.exists() and staged.stat().st_size > BIG // 8, "a part to arrive")
    os.killpg(client.pid, 9)
    client.wait()
    assert not (home / "a-1").exists()
    assert 0 < staged.stat().st_size < BIG * 4
    get(host, home)
    assert tree(home) == tree(sshd.path(RUNS))


@pytest.mark.parametrize("size", [500_000, 1_000_000, 1_000_001, 2_000_000])
def test_wrong_bytes_in_staging_are_replaced(host: Host, sshd: Sshd, home: Path, size: int) -> None:
    save(sshd, "a-1", 100, size=1_000_000)
    staged = home / ".staging/a-1/checkpoints/step-00000100/model.safetensors"
    staged.parent.mkdir(parents=True)
    staged.write_bytes(b"x" * size)
    (staged.parent / "stray").write_bytes(b"x")
    get(host, home)
    assert tree(home) == tree(sshd.path(RUNS))


def test_two_fetches_at_once_do_not_mix(host: Host, sshd: Sshd, home: Path) -> None:
    save(sshd, "a-1", 100)
    (home / ".staging").mkdir()
    handle = os.open(home / ".staging", os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    assert "Another fetch" in refused(host, home).message
    os.close(handle)
    get(host, home)


# What is wrong on the host


def test_a_truncated_file_is_not_taken_and_the_good_ones_are(host: Host, sshd: Sshd, home: Path) -> None:
    bad = save(sshd, "a-1", 100, size=1_000_000)
    os.truncate(bad / "model.safetensors", 999_999)
    save(sshd, "a-1", 200)
    error = refused(host, home)
    assert "a-1/checkpoints/step-00000100/model.safetensors" in error.message
    assert "1 checkpoints of box are here and good" in error.message
    assert not (home / "a-1/checkpoints/step-00000100").exists()
    assert (home / "a-1/checkpoints/step-00000200/manifest.json").exists()
    assert (home / "a-1/checkpoints/latest").read_text() == "step-00000200\n"


@pytest.mark.parametrize("damage", ["flip", "remove", "link"])
def test_other_damage_is_not_taken(host: Host, sshd: Sshd, home: Path, damage: str) -> None:
    model = save(sshd, "a-1", 100) / "model.safetensors"
    data = bytearray(model.read_bytes())
    model.unlink()
    if damage == "flip":
        data[500] ^= 1
        model.write_bytes(data)
    elif damage == "link":
        model.symlink_to("/etc/passwd")
    assert "cannot be read whole there, or is not what its manifest says" in refused(host, home).message
    assert not (home / "a-1/checkpoints/step-00000100").exists()


def test_a_checkpoint_that_is_pruned_meanwhile_is_no_error(
    host: Host, sshd: Sshd, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pruned = save(sshd, "a-1", 100)
    save(sshd, "a-1", 200)
    bring = fetch.bring

    def prune_first(*args: object) -> set[PurePosixPath]:
        shutil.rmtree(pruned)
        return bring(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(fetch, "bring", prune_first)
    done = get(host, home)
    assert done.moved == (PurePosixPath("a-1/checkpoints/step-00000200"),)
    assert not list(home.rglob("step-00000100"))


def test_a_full_disk_is_told_before_it_is_full(
    host: Host, sshd: Sshd, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(sshd, "a-1", 100, size=1_000_000)
    usage = shutil.disk_usage(home)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=10_000))
    assert "1.0 MB are to be fetched" in refused(host, home).message


def test_what_is_staged_already_needs_no_room_again(
    host: Host, sshd: Sshd, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = save(sshd, "a-1", 100, size=1_000_000) / "model.safetensors"
    staged = home / ".staging/a-1/checkpoints/step-00000100/model.safetensors"
    staged.parent.mkdir(parents=True)
    staged.write_bytes(model.read_bytes()[:990_000])
    usage = shutil.disk_usage(home)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=20_000))
    get(host, home)
    assert tree(home) == tree(sshd.path(RUNS))


@pytest.mark.parametrize("full_at", [4_000_000, 1_010_000])
def test_a_disk_that_fills_up_while_it_is_written(
    host: Host, sshd: Sshd, home: Path, monkeypatch: pytest.MonkeyPatch, full_at: int
) -> None:
    """Somebody else fills it after the check: what arrived is gone on with once there is room, and nothing is half."""
    save(sshd, "a-1", 100, size=1_000_000)
    save(sshd, "a-1", 200, size=4_000_000)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={full_at}", "tmpfs", home], check=True)
    try:
        usage = shutil.disk_usage(home)
        with monkeypatch.context() as patch:
            patch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=10**12))
            error = refused(host, home)
        assert "disk" in error.message
        assert "full" in error.message
        assert "goes on where it stopped" in error.hint
        for manifest in home.glob("*/checkpoints/step-*/manifest.json"):
            for name, piece in parse_manifest(manifest.read_bytes()).items():
                assert fetch.matches(manifest.parent / name, piece)
        subprocess.run(["mount", "-o", "remount,size=20000000", home], check=True)
        get(host, home)
        assert tree(home) == tree(sshd.path(RUNS))
    finally:
        subprocess.run(["umount", home], check=True)


def test_two_fetches_of_two_processes(host: Host, sshd: Sshd, home: Path) -> None:
    """The second one ends with a message while the first is at work; the first one is not disturbed."""
    save(sshd, "a-1", 100, size=BIG * 2)
    code = textwrap.dedent(CLIENT).format(
        machines=str(sshd.pins.parent), pins=str(sshd.pins), identity=str(sshd.identity), home=str(home)
    )
    first = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.DEVNULL)
    staged = home / ".staging/a-1/checkpoints/step-00000100/model.safetensors"
    try:
        wait_for(lambda: staged.exists() or first.poll() is not None, "a part to arrive")
        os.kill(first.pid, signal.SIGSTOP)
        assert "Another fetch into" in refused(host, home).message
    finally:
        os.kill(first.pid, signal.SIGCONT)
    assert first.wait(60) == 0
    assert tree(home) == tree(sshd.path(RUNS))


# What the host says is not believed


GOOD = {"bytes": 3, "sha256": "0" * 64}


@pytest.mark.parametrize(
    ("files", "complaint"),
    [
        ({"../../../.bashrc": GOOD}, "names the file"),
        ({"a/b": GOOD}, "names the file"),
        ({"..": GOOD}, "names the file"),
        ({"": GOOD}, "names the file"),
        ({".hidden": GOOD}, "names the file"),
        ({"-e sh": GOOD}, "names the file"),
        ({"a\nb": GOOD}, "names the file"),
        ({"manifest.json": GOOD}, "names the file"),
        ({"a": {"bytes": -1, "sha256": "0" * 64}}, "bytes"),
        ({"a": {"bytes": True, "sha256": "0" * 64}}, "bytes"),
        ({"a": {"bytes": "3", "sha256": "0" * 64}}, "bytes"),
        ({"a": {"bytes": 3, "sha256": "0" * 63}}, "sha256"),
        ({"a": {"bytes": 3, "sha256": None}}, "sha256"),
        ({"a": {"bytes": 3}}, "cannot be read"),
        ({"a": 3}, "cannot be read"),
        (["a"], "cannot be read"),
        (None, "cannot be read"),
    ],
)
def test_a_manifest_that_cannot_be_is_refused(files: object, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        parse_manifest(json.dumps({"format": 1, "files": files}).encode())


def test_manifests_that_are_none_are_refused() -> None:
    for data in (b"", b"{", b"[]", b"null", b"\xff", b"{}", b'{"format": 2, "files": {}}', b'{"format": 1}'):
        with pytest.raises(ValueError, match="its manifest"):
            parse_manifest(data)


def test_a_listing_is_read_line_by_line_and_what_is_odd_is_named() -> None:
    manifest = json.dumps({"format": 1, "files": {"a": GOOD}}).encode()
    coded = b64encode(manifest).decode()
    good = f"run r-1\nfile metrics.jsonl 3 {'0' * 64}\npointer latest step-00000001\nmanifest step-00000001 {coded}\n"
    listing = parse_listing(good)
    assert listing.refused == []
    assert listing.checkpoints[0].manifest == manifest
    assert listing.runs["r-1"].pointers == {"latest": "step-00000001"}
    for odd in (
        "run ../r-1",
        "run .ssh",
        f"file ../x 3 {'0' * 64}",
        "pointer latest ../../x",
        f"manifest ../step-00000001 {coded}",
        f"manifest step-00000001/.. {coded}",
        "manifest step-00000001 ###",
        "manifest step-00000001 ",
        "a word",
    ):
        assert len(parse_listing(good.splitlines()[0] + "\n" + odd).refused) == 1, odd


def test_a_bad_manifest_does_not_keep_the_good_ones_away(host: Host, sshd: Sshd, home: Path) -> None:
    save(sshd, "a-1", 100, files={"../../../../escaped": GOOD})
    save(sshd, "a-1", 200)
    error = refused(host, home / "deep" / "home")
    assert "names the file '../../../../escaped'" in error.message
    assert (home / "deep/home/a-1/checkpoints/step-00000200/manifest.json").exists()
    assert not list(home.parent.rglob("escaped"))
