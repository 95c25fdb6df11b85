"""One script, one exec: what goes in, what comes out, and how its loss is noticed. Real sshd, real bash."""

import hashlib
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path, PurePosixPath

import pytest

from provision.dial import Wanted
from provision.errors import ConnectionLost, ProvisionError, ScriptFailed
from provision.host import Host, connect
from provision.link import BASH
from provision.transfer import pack, put_script, tree_script
from tests.sshd import Proxy, Sshd, wait_for


@pytest.fixture
def host(sshd: Sshd) -> Iterator[Host]:
    """The installed system: user ml, who may sudo."""
    sshd.pin()
    with connect(sshd.machine(), sshd.pins) as session:
        yield session


def impatient(sshd: Sshd, port: int) -> Host:
    """A Host that gives a silent connection up after one second."""
    sshd.pin()
    return Host(Wanted(sshd.machine(port=port), sshd.pins), beat_s=0.2, silence_s=1)


def test_a_script_is_one_exec_and_its_streams_stay_apart(host: Host) -> None:
    result = host.run("echo out; echo err >&2; printf 'no newline'")
    assert (result.code, result.stdout, result.stderr) == (0, "out\nno newline", "err\n")
    assert host.traffic.execs == 1


def test_the_shell_is_strict_and_speaks_c(host: Host) -> None:
    assert host.run("echo $LC_ALL; echo $-").stdout.split()[0] == "C"
    for script in ("false; echo on", "echo $undefined; echo on", "false | true; echo on"):
        with pytest.raises(ScriptFailed) as caught:
            host.run(script)
        assert caught.value.code == 1
        assert "on" not in host.run(script, check=False).stdout.split()


def test_a_failure_shows_the_last_lines_and_the_status(host: Host) -> None:
    with pytest.raises(ScriptFailed) as caught:
        host.run("for i in {1..90}; do echo line $i; done >&2; exit 7")
    assert caught.value.code == 7
    assert "status 7" in caught.value.message
    assert "line 90" in caught.value.message
    assert "line 60\n" not in caught.value.message


def test_commands_in_the_script_do_not_eat_the_script(host: Host) -> None:
    assert host.run("cat; head -c 3; read -r x || echo end; echo after").stdout == "end\nafter\n"


def test_stdin_is_exactly_the_given_bytes(host: Host) -> None:
    data = bytes(range(256)) * 9 + b"no newline"
    result = host.run("read -r -N 0; sha256sum; echo after", stdin=data)
    assert result.stdout == f"{hashlib.sha256(data).hexdigest()}  -\nafter\n"


@pytest.mark.parametrize(
    "ending", ["", "\n", "\n\n", "\\\n", "  # comment", "\ncat <<EOF\nhere\nEOF", "\ncat <<EOF\nhere\nEOF\n"]
)
def test_scripts_may_end_in_any_way(host: Host, ending: str) -> None:
    assert host.run("echo begin; echo 'ü ! \\ \" $HOME'" + ending).stdout.startswith(
        'begin\nü ! \\ " $HOME\n'
    )


def test_the_status_of_the_last_command_is_that_of_the_script(host: Host) -> None:
    assert host.run("[ -e /nowhere ] && echo there", check=False).code == 1


def test_a_megabyte_of_script(host: Host) -> None:
    script = (
        "".join(f"x{number}='{'y' * 60}' # a comment\n" for number in range(13_000)) + "echo $x12999; cat\n"
    )
    assert len(script) > 1_000_000
    assert host.run(script, stdin=b"data").stdout == "y" * 60 + "\ndata"


def test_large_input_and_output_at_once_do_not_block_each_other(host: Host) -> None:
    data = b"0123456789abcdef" * (1 << 16) * 8  # 8 MiB: beyond both windows
    result = host.run("tee /dev/stderr", stdin=data)
    assert result.stdout.encode() == data
    assert result.stderr.encode() == data
    assert host.traffic.bytes_received >= 2 * len(data)
    assert host.traffic.bytes_sent >= len(data)


def test_fifteen_megabytes_of_output_are_not_rejoined_again_and_again(host: Host) -> None:
    started = time.process_time()
    result = host.run("head -c 15000000 /dev/zero | tr '\\0' x")
    assert len(result.stdout) == 15_000_000
    # Our own CPU time, not the wall clock: quadratic joining takes a minute of it, this under a second.
    assert time.process_time() - started < 15


def test_a_script_that_ignores_its_input_ends(host: Host) -> None:
    assert host.run("echo done", stdin=b"x" * 20_000_000).stdout == "done\n"


def test_a_child_in_the_background_does_not_hold_the_answer_back(host: Host) -> None:
    assert host.run("sleep 300 & echo started", deadline_s=5).stdout == "started\n"


def test_the_host_ends_a_script_at_the_deadline(host: Host, sshd: Sshd) -> None:
    with pytest.raises(ProvisionError, match=r"not done after 1 s and was ended there\.\nbegin") as caught:
        host.run("echo begin; trap '' HUP; sleep 30.125; echo end", deadline_s=1)
    assert not isinstance(caught.value, ConnectionLost)
    wait_for(lambda: "30.125" not in sshd.inside("ps", "-eo", "args").stdout, "the script to be ended")
    assert host.run("echo on").stdout == "on\n"


def test_a_status_of_124_is_the_scripts_own_before_the_deadline(host: Host) -> None:
    assert host.run("exit 124", check=False).code == 124


def test_a_killed_script_is_not_taken_for_a_lost_connection(host: Host) -> None:
    with pytest.raises(ProvisionError, match="was killed on the host") as caught:
        host.run("kill -KILL $PPID; kill -KILL $$; sleep 9", as_root=False)
    assert not isinstance(caught.value, ConnectionLost)


# Login shells


@pytest.mark.parametrize("shell", ["/bin/zsh", "/bin/dash", "/bin/bash"])
def test_any_login_shell_and_start_files_that_print(tmp_path: Path, shell: str) -> None:
    server = Sshd(tmp_path / "sshd", shell=shell)
    try:
        for name in (".bashrc", ".zshenv"):
            server.path(f"/run/home/ml/{name}").write_text(
                "echo garbage; echo noise >&2; printf partial\nalias echo=false\n"
            )
        server.pin()
        with connect(server.machine(), server.pins) as session:
            for as_root in (True, False):
                result = session.run("echo ${BASH_VERSION%%.*}; echo err >&2", as_root=as_root)
                assert int(result.stdout) >= 4
                assert result.stderr == "err\n"
    finally:
        server.close()


def test_a_user_who_may_not_sudo_is_told(tmp_path: Path) -> None:
    server = Sshd(tmp_path / "sshd", sudoer="")
    try:
        server.pin()
        with connect(server.machine(), server.pins) as session:
            assert session.run("id -un", as_root=False).stdout == "ml\n"
            with pytest.raises(ProvisionError, match="sudo: a password is required") as caught:
                session.run("id -un")
            assert "NOPASSWD" in caught.value.hint
    finally:
        server.close()


# Connections that end


def test_a_closed_connection_is_unknown_not_failed(host: Host, sshd: Sshd) -> None:
    with pytest.raises(ConnectionLost, match="closed the connection") as caught:
        host.run(f"touch /run/began; kill -KILL {' '.join(sshd.sessions())}; sleep 20")
    assert "look" in caught.value.hint
    assert sshd.path("/run/began").exists()
    assert host.run("echo back").stdout == "back\n", "the next run dials again"


@pytest.mark.parametrize("script", ["sleep 60", "head -c 100000000 /dev/zero; sleep 60", "cat >/dev/null"])
def test_a_vanished_host_is_noticed_whatever_flows(sshd: Sshd, proxy: Proxy, script: str) -> None:
    with impatient(sshd, proxy.port) as host:
        wait_for(lambda: host.run("echo there").stdout == "there\n", "the first answer")
        before = proxy.relayed_bytes

        def vanish() -> None:
            wait_for(lambda: proxy.relayed_bytes > before + 1000, "the script to be on its way")
            proxy.swallow()

        threading.Thread(target=vanish, daemon=True).start()
        with pytest.raises(ConnectionLost, match="did not answer for 1 s"):
            host.run(script, stdin=b"x" * 30_000_000, deadline_s=50)


def test_output_that_stops_while_an_answer_is_due_is_noticed(sshd: Sshd, proxy: Proxy) -> None:
    """The question is asked once and its answer never comes; output goes on for longer than the patience lasts."""
    with impatient(sshd, proxy.port) as host:
        transport = host.link.transport
        transport.global_request = lambda kind, wait: transport.join()
        script = "for i in {1..25}; do echo $i; sleep 0.1; done; sleep 60"
        lines: list[bytes] = []
        with pytest.raises(ConnectionLost, match="did not answer for 1 s"):
            host.link.bash(script, b"", lines.append, print, what="the script", deadline_s=40)
        assert b"".join(lines).endswith(b"25\n"), "it was not given up while something came"


def test_a_vanished_host_is_noticed_at_the_next_call(sshd: Sshd, proxy: Proxy) -> None:
    with impatient(sshd, proxy.port) as host:
        proxy.swallow()
        with pytest.raises(ConnectionLost):
            host.run("true")


def test_a_quiet_script_on_a_slow_line_is_not_taken_for_dead(sshd: Sshd) -> None:
    relay = Proxy(sshd.port, delay_s=0.05)
    with impatient(sshd, relay.port) as host:
        assert host.run("sleep 2.5; echo there").stdout == "there\n"
    relay.close()


def test_half_a_script_never_runs(sshd: Sshd) -> None:
    """The connection ends while the script is being sent: bash got the beginning of it, and must not act on that."""
    sshd.pin()
    with connect(sshd.machine(), sshd.pins) as host:
        channel = host.link.transport.open_session()
        channel.exec_command(f"exec {BASH}")
        channel.sendall(b"mark 4000\ntouch /run/home/ml/half\n")
        channel.shutdown_write()
        assert channel.recv_exit_status() == 1
    assert not sshd.path("/run/home/ml/half").exists()


# Files


def test_put_writes_whole_files_with_mode_and_keeps_the_owner(host: Host, sshd: Sshd, tmp_path: Path) -> None:
    target = PurePosixPath("/run/home/ml/a file")
    data = bytes(range(256)) * 5000
    host.put(data, target, mode=0o640)
    there = sshd.path(str(target))
    assert there.read_bytes() == data
    assert (there.stat().st_mode & 0o7777, there.stat().st_uid) == (0o640, 0)
    host.run("chown ml: '/run/home/ml/a file'")
    local = tmp_path / "local"
    local.write_text("{braces} and $dollars survive\n")
    host.put(local, target)
    assert there.read_text() == "{braces} and $dollars survive\n"
    assert (there.stat().st_mode & 0o7777, there.stat().st_uid) == (0o644, 4242)
    host.put(b"mine", PurePosixPath("/run/home/ml/mine"), as_root=False)
    assert sshd.path("/run/home/ml/mine").stat().st_uid == 4242
    assert sorted(path.name for path in sshd.path("/run/home/ml").iterdir()) == ["a file", "mine"]


def test_what_is_cut_short_on_the_way_changes_nothing(host: Host, sshd: Sshd) -> None:
    target = PurePosixPath("/run/home/ml/file")
    host.put(b"old", target)
    for script, data in (
        (put_script(b"new and long", target, 0o644), b"new and"),
        (tree_script(packed := pack({"a": b"1"}), target), packed[:-512]),
    ):
        with pytest.raises(ScriptFailed, match="did not arrive whole"):
            host.run(script, stdin=data)
    assert sshd.path(str(target)).read_bytes() == b"old"
    assert [path.name for path in sshd.path("/run/home/ml").iterdir()] == ["file"]


def test_send_tree_makes_exactly_these_files_in_one_exec(host: Host, sshd: Sshd) -> None:
    target = PurePosixPath("/run/home/ml/source/abc")
    before = host.traffic.execs
    host.send_tree({"pkg/a.py": b"a = 1\n", "pkg/data/b.bin": b"\0\xff"}, target, as_root=False)
    assert host.traffic.execs == before + 1
    host.send_tree({"pkg/a.py": b"a = 2\n"}, target, as_root=False)
    there = sshd.path(str(target))
    assert [path for path in there.rglob("*") if path.is_file()] == [there / "pkg/a.py"]
    assert (there / "pkg/a.py").read_text() == "a = 2\n"
    assert (there / "pkg").stat().st_uid == 4242
    assert [path.name for path in there.parent.iterdir()] == ["abc"]


# rsync


def test_rsync_uses_the_same_pin_and_key(host: Host, sshd: Sshd, tmp_path: Path) -> None:
    host.put(b"x" * 100_000, PurePosixPath("/run/home/ml/data file"))
    before = host.traffic.bytes_received
    host.rsync(["-s", host.remote(PurePosixPath("/run/home/ml/data file")), str(tmp_path)])
    assert (tmp_path / "data file").read_bytes() == b"x" * 100_000
    assert host.traffic.bytes_received > before


def test_rsync_refuses_a_changed_key(host: Host, sshd: Sshd, tmp_path: Path) -> None:
    host.put(b"x", PurePosixPath("/run/home/ml/data"))
    sshd.swap_host_key()
    with pytest.raises(ProvisionError, match="host presents another"):
        host.rsync([host.remote(PurePosixPath("/run/home/ml/data")), str(tmp_path)])
    assert not (tmp_path / "data").exists()


def test_rsync_says_that_it_needs_a_key(host: Host) -> None:
    host.login = replace(host.login, by="the password", key_file="")
    with pytest.raises(ProvisionError, match="it needs a key") as caught:
        host.rsync([])
    assert "ssh-copy-id" in caught.value.hint


def test_rsync_missing_on_the_host_is_said(host: Host, sshd: Sshd, tmp_path: Path) -> None:
    sshd.path("/run/bin/rsync").write_text(
        "#!/bin/sh\necho 'bash: line 1: rsync: command not found' >&2; exit 127\n"
    )
    sshd.path("/run/bin/rsync").chmod(0o755)
    with pytest.raises(ProvisionError, match="There is no rsync on box"):
        host.rsync([host.remote(PurePosixPath("/run/home/ml/data")), str(tmp_path)])


def test_a_reader_that_is_slow_loses_nothing(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    """The script has ended long before its output was worked off."""
    monkeypatch.setattr("provision.link.LINGER_S", 0.05)
    read: list[bytes] = []

    def slowly(data: bytes) -> None:
        time.sleep(0.2)
        read.append(data)

    code = host.link.bash("seq 1 30000", b"", slowly, read.append, what="the script", deadline_s=60)
    assert code == 0
    assert b"".join(read) == b"".join(b"%d\n" % number for number in range(1, 30001))


def test_what_only_looks_is_asked_again_after_a_lost_connection(sshd: Sshd, proxy: Proxy) -> None:
    """Away for some seconds in the middle of a probe, and once more between two: nobody has to type anything again."""
    sshd.pin()
    with Host(Wanted(sshd.machine(port=proxy.port), sshd.pins)) as host:
        before = proxy.relayed_bytes

        def cut() -> None:
            wait_for(lambda: proxy.relayed_bytes > before + 1000, "the probe to be on its way")
            proxy.cut(accept=False)
            time.sleep(2)
            proxy.mend()

        cutter = threading.Thread(target=cut)
        cutter.start()
        assert host.look("sleep 1; echo seen").stdout == "seen\n"
        cutter.join()
        assert proxy.accepted >= 2
        proxy.cut(accept=False)
        wait_for(lambda: not host.link.alive, "the loss to be noticed")
        threading.Timer(2, proxy.mend).start()
        assert host.run("echo back").stdout == "back\n"
