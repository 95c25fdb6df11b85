"""Scripts that outlive the connection. The unit is started by tests/standin/systemd-run; the rest is real."""

import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import pytest

from provision.dial import Wanted
from provision.errors import ProvisionError, Refused, Unreachable
from provision.host import Host, connect
from provision.units import Following, Lines
from tests.sshd import Proxy, Sshd, wait_for

COUNT = "for i in {1..40}; do echo line $i; sleep 0.1; done; exit 5"
COUNTED = [f"line {i}" for i in range(1, 41)]


@pytest.fixture
def host(sshd: Sshd, proxy: Proxy) -> Iterator[Host]:
    """The installed system, through the proxy; a silent connection is given up after a second."""
    sshd.pin()
    with Host(
        Wanted(sshd.machine(port=proxy.port), sshd.pins, timeout_s=2), beat_s=0.2, silence_s=1
    ) as session:
        yield session
    while ACTING:  # before their server is taken from them
        ACTING.pop().join(30)


ACTING: list[threading.Thread] = []


def in_the_middle(sshd: Sshd, unit: str, act: object) -> threading.Thread:
    """Call `act` once the unit has written a few lines; at the test's end it has done it."""

    def wait() -> None:
        log = sshd.path(f"/run/metal/{unit}/log")
        wait_for(lambda: log.exists() and log.read_text().count("\n") > 5, "the unit to write")
        act()  # type: ignore[operator]

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    ACTING.append(thread)
    return thread


def test_a_unit_runs_its_script_and_hands_out_lines_and_status(host: Host, sshd: Sshd) -> None:
    lines: list[str] = []
    script = "id -un; echo $HOME $LC_ALL; echo err >&2; cat; false | true; echo not reached"
    code = host.run_unit("metal-test", script, on_line=lines.append, deadline_s=30)
    assert (code, lines) == (1, ["root", "/root C", "err"])
    folder = sshd.path("/run/metal/metal-test")
    assert folder.stat().st_mode & 0o777 == 0o700
    assert (folder / "status").read_text() == "1\n"
    assert host.traffic.execs == 2, "one to start, one to follow"


def test_a_unit_may_run_again_and_as_a_user(host: Host) -> None:
    for word in ("first", "second"):
        lines: list[str] = []
        script = f"id -un; pwd; echo $HOME {word}; exit 3"
        assert host.run_unit("metal-test", script, on_line=lines.append, deadline_s=30, user="ml") == 3
        assert lines == ["ml", "/", f"/run/home/ml {word}"]


def test_a_unit_that_cannot_start_is_an_error(host: Host, sshd: Sshd) -> None:
    sshd.path("/run/bin/systemd-run").write_text(
        "#!/bin/sh\necho 'Failed to start transient unit: no.' >&2; exit 1\n"
    )
    for _ in range(2):
        with pytest.raises(ProvisionError, match="Failed to start transient unit: no"):
            host.run_unit("metal-test", "true", on_line=print, deadline_s=30)


def test_properties_reach_systemd(host: Host, sshd: Sshd) -> None:
    properties = ["KillSignal=SIGTERM", "Description=with spaces and 'quotes'"]
    host.run_unit("metal-test", "exit 1", on_line=print, deadline_s=30, properties=properties)
    seen = sshd.path("/run/standin-systemd/metal-test/properties").read_text().splitlines()
    assert seen == properties


# Losing the connection


@pytest.mark.parametrize("how", ["cut", "swallow", "sshd restarts"])
def test_a_lost_connection_loses_no_line_and_no_status(
    host: Host, sshd: Sshd, proxy: Proxy, how: str
) -> None:
    def swallow_and_mend() -> None:
        proxy.swallow()
        time.sleep(1.5)
        proxy.mend()

    acts = {"cut": proxy.cut, "swallow": swallow_and_mend, "sshd restarts": sshd.restart}
    progress: list[str] = []
    host.progress = progress.append
    lines: list[str] = []
    thread = in_the_middle(sshd, "metal-test", acts[how])
    assert host.run_unit("metal-test", COUNT, on_line=lines.append, deadline_s=60) == 5
    thread.join()
    assert lines == COUNTED
    assert len(progress) == 2
    assert "goes on there" in progress[0]
    assert "at byte" in progress[1]


def test_the_script_runs_once_though_its_start_was_sent_twice(host: Host, sshd: Sshd, proxy: Proxy) -> None:
    """The connection breaks after the host has started the unit and before it could say so."""
    real = sshd.path("/run/bin/systemd-run")
    real.rename(real.with_name("systemd-run.real"))
    real.write_text('#!/bin/bash\n/run/bin/systemd-run.real "$@"; touch /run/started; sleep 3\n')
    real.chmod(0o755)

    def cut() -> None:
        wait_for(sshd.path("/run/started").exists, "the unit to start")
        proxy.cut()

    threading.Thread(target=cut, daemon=True).start()
    lines: list[str] = []
    script = "echo run >>/run/runs; echo done"
    assert host.run_unit("metal-test", script, on_line=lines.append, deadline_s=30) == 0
    assert lines == ["done"]
    assert sshd.path("/run/runs").read_text() == "run\n"
    assert proxy.accepted == 2


def test_the_deadline_holds_while_nobody_answers(host: Host, sshd: Sshd, proxy: Proxy) -> None:
    in_the_middle(sshd, "metal-test", lambda: proxy.cut(accept=False))
    started = time.monotonic()
    with pytest.raises(Unreachable, match="went away and was not back after"):
        host.run_unit("metal-test", COUNT, on_line=print, deadline_s=4)
    assert time.monotonic() - started < 60


def test_the_deadline_holds_while_it_runs_and_leaves_it_running(host: Host, sshd: Sshd) -> None:
    script = "while [ ! -e /run/go ]; do sleep 0.1; done; touch /run/ended"
    with pytest.raises(ProvisionError, match="left running"):
        host.run_unit("metal-test", script, on_line=print, deadline_s=1)
    sshd.path("/run/go").touch()
    wait_for(sshd.path("/run/ended").exists, "the unit to end by itself")


def test_another_machine_at_the_address_ends_the_following(host: Host, sshd: Sshd) -> None:
    in_the_middle(sshd, "metal-test", sshd.swap_host_key)
    with pytest.raises(Refused, match="not the expected one"):
        host.run_unit("metal-test", COUNT, on_line=print, deadline_s=60)


# Killed clients


CLIENT = """
    import sys
    from pathlib import Path
    from provision.dial import Wanted
    from provision.host import Host
    from provision.machine import load_machine
    machine = load_machine("box", Path({machines!r}))
    host = Host(Wanted(machine, Path({pins!r}), key_files=[{identity!r}]))
    sys.exit(host.run_unit("metal-test", {script!r}, on_line=lambda line: print(line, flush=True), deadline_s=60))
"""


def test_a_killed_client_kills_nothing_and_the_next_one_joins(host: Host, sshd: Sshd) -> None:
    script = COUNT + " # once"
    code = textwrap.dedent(CLIENT).format(
        machines=str(sshd.pins.parent), pins=str(sshd.pins), identity=str(sshd.identity), script=script
    )
    client = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert client.stdout
    assert client.stdout.readline() == "line 1\n"
    client.kill()
    client.wait()
    client.stdout.close()
    progress: list[str] = []
    host.progress = progress.append
    lines: list[str] = []
    assert host.run_unit("metal-test", script, on_line=lines.append, deadline_s=60) == 5
    assert lines == COUNTED
    assert progress == ["metal-test is running already; following it"]
    wait_for(
        lambda: "polls" not in sshd.inside("ps", "-eo", "args").stdout, "the followers to notice and end"
    )


def test_a_follower_on_the_host_ends_with_its_client_though_the_log_is_quiet(host: Host, sshd: Sshd) -> None:
    def followers() -> int:
        return sshd.inside("ps", "-eo", "args").stdout.count(
            "bash --norc --noprofile -c export LC_ALL=C; read"
        )

    folder = PurePosixPath("/run/metal/metal-test")
    host.start_unit("metal-test", "echo on; sleep 300", folder=folder)

    def leave(line: str) -> None:
        assert followers() > 0
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        host.follow(folder / "log", "metal-test", on_line=leave, deadline_s=30)
    sshd.drop_connections()
    wait_for(lambda: followers() == 0, "the follower to notice")
    assert sshd.inside("/run/bin/systemctl", "is-active", "metal-test").stdout == "active\n"


def test_another_script_under_the_name_is_waited_for(host: Host, sshd: Sshd) -> None:
    with connect(sshd.machine(), sshd.pins) as other:
        other.start_unit(
            "metal-test", "echo theirs; sleep 1; exit 9", folder=PurePosixPath("/run/metal/metal-test")
        )
    lines: list[str] = []
    assert host.run_unit("metal-test", "echo ours", on_line=lines.append, deadline_s=30) == 0
    assert lines == ["theirs", "ours"]


def test_ctrl_c_stops_the_following_only(host: Host, sshd: Sshd) -> None:
    def press(line: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        host.run_unit("metal-test", "echo on; sleep 1; touch /run/ended", on_line=press, deadline_s=30)
    wait_for(sshd.path("/run/ended").exists, "the unit to end by itself")


# Units that end badly


def test_a_killed_unit_is_reported(host: Host, sshd: Sshd) -> None:
    in_the_middle(sshd, "metal-test", lambda: sshd.inside("/run/bin/systemctl", "kill", "metal-test"))
    with pytest.raises(ProvisionError, match=r"ended without an exit status \(Result=signal") as caught:
        host.run_unit("metal-test", COUNT, on_line=print, deadline_s=30)
    assert "journalctl -u metal-test" in caught.value.hint


def test_a_unit_that_a_restart_took_with_it_is_reported(host: Host, sshd: Sshd) -> None:
    def restart() -> None:
        sshd.inside("/run/bin/systemctl", "kill", "metal-test")
        sshd.inside("rm", "-rf", "/run/metal", "/run/standin-systemd")

    in_the_middle(sshd, "metal-test", restart)
    with pytest.raises(ProvisionError, match="or the machine restarted"):
        host.run_unit("metal-test", COUNT, on_line=print, deadline_s=30)


def test_a_stopped_unit_still_leaves_the_status_of_its_script(host: Host, sshd: Sshd) -> None:
    script = "trap 'echo saving; sleep 0.3; echo saved; exit 0' TERM; for i in {1..100}; do echo $i; sleep 0.1; done"
    in_the_middle(sshd, "metal-test", lambda: sshd.inside("/run/bin/systemctl", "stop", "metal-test"))
    lines: list[str] = []
    assert host.run_unit("metal-test", script, on_line=lines.append, deadline_s=30) == 0
    assert lines[-2:] == ["saving", "saved"]


# Logs


def test_a_large_log_arrives_whole_and_in_order(host: Host) -> None:
    lines: list[str] = []
    assert host.run_unit("metal-test", "seq 1 1500000", on_line=lines.append, deadline_s=100) == 0
    assert len(lines) == 1_500_000
    assert lines[-1] == "1500000"


def test_a_log_that_goes_while_it_is_read_is_no_error_and_one_that_cannot_be_read_is(
    host: Host, sshd: Sshd
) -> None:
    """`tail` finds the log gone that `stat` still saw: it looks again, and says what became of the unit."""
    tail = sshd.path("/run/bin/tail")
    tail.write_text('#!/bin/bash\nrm -f /run/metal/metal-test/log\nexec /usr/bin/tail "$@"\n')
    tail.chmod(0o755)
    assert host.run_unit("metal-test", "echo on; exit 4", on_line=print, deadline_s=30) == 4
    tail.unlink()
    sshd.path("/run/home/ml/log").write_text("secret\n")
    sshd.path("/run/home/ml/log").chmod(0o600)
    with pytest.raises(ProvisionError, match="cannot be followed"):
        host.follow(PurePosixPath("/run/home/ml/log"), "x", on_line=print, deadline_s=30, as_root=False)


def test_a_log_is_followed_from_an_offset(host: Host, sshd: Sshd) -> None:
    host.run_unit("metal-test", "printf 'one\\ntwo\\nlast'", on_line=print, deadline_s=30)
    lines: list[str] = []
    log = PurePosixPath("/run/metal/metal-test/log")
    assert host.follow(log, "metal-test", on_line=lines.append, deadline_s=30, offset=4) == 0
    assert lines == ["two", "last"]


def test_characters_and_lines_survive_any_cut() -> None:
    text = "schön ✓ 𝄞\r\n\nlast ü"
    data = text.encode() + b"\xff"
    for size in range(1, len(data)):
        seen: list[str] = []
        lines = Lines(seen.append)
        for start in range(0, len(data), size):
            lines.feed(data[start : start + size])
        lines.feed(b"", final=True)
        assert seen == ["schön ✓ 𝄞", "", "last ü\ufffd"]


def test_a_log_cannot_write_to_the_terminal() -> None:
    seen: list[str] = []
    Lines(seen.append).feed(b"\x1b]0;title\x07 a\tb \xc2\x9b2J\n 5%\r 50%\r100%\r\n")
    assert seen == ["\ufffd]0;title\ufffd a\tb \ufffd2J", "100%"]


def test_a_word_cut_by_a_lost_connection_is_not_glued_to_the_next() -> None:
    following = Following(print)
    following.control(b"beat\nend 4")
    following.reconnected()
    following.control(b"2\nbeat\n")
    assert following.code is None
    following.control(b"end 7\n")
    assert following.code == 7
    following.reconnected()
    assert following.code is None, "the last of the log may have been lost with the connection"


def test_unit_names_are_checked(host: Host) -> None:
    for name in ("", "a/b", "a b", "../x", "a;b"):
        with pytest.raises(ValueError, match="not a unit name"):
            host.run_unit(name, "true", on_line=print, deadline_s=5)


def test_nothing_is_left_open(sshd: Sshd, tmp_path: Path) -> None:
    sshd.pin()
    with connect(sshd.machine(), sshd.pins) as session:
        session.run_unit("metal-test", "echo on", on_line=print, deadline_s=30)
    wait_for(lambda: not sshd.sessions(), "the sessions to end")
