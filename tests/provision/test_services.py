"""Firewall, Wi-Fi, sshd's hardening and timers: as planned, refused, and done for real where a test can."""

import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from provision.errors import ProvisionError
from provision.facts import Facts
from provision.machine import Machine
from provision.own import WifiWanted
from provision.secrets import Secret
from provision.steps import (
    Step,
    make_plan,
    parse_probes,
    render_apply,
    render_plan,
    render_probes,
    secret_file,
)
from provision.system import system
from provision.system.firewall import open_ports, rules, sshd_is_open
from provision.system.wireless import FOLDER, connection, slug
from tests.provision.conftest import Run
from tests.provision.test_own import added, error_of, wish
from tests.provision.test_system import GOLDEN, NOW, installed, render

WISHES = {
    "firewall": '[firewall]\nenabled = true\ntcp = ["6006-6010", "8080"]\nudp = ["51820"]\npeers = ["10.9.9.1", "10.9.8.0/24"]\n[sshd]\nhardened = true\n',
    "timers": '[timers]\nfstrim = true\npaccache = true\nreflector = true\n[mirror]\ncountries = ["DE", "United Kingdom"]\n',
    "wifi": '[wifi."The cellar"]\npassphrase = "env:WIFI"\npriority = 5\n[wifi.cafe]\nsecurity = "open"\nhidden = true\n',
}
NFT = shutil.which("nft", path="/usr/sbin:/usr/bin:/sbin:/bin")


@pytest.mark.parametrize("name", WISHES)
@pytest.mark.parametrize("system_name", ["live", "installed"])
def test_golden_steps(tmp_path: Path, machine: Machine, live: Facts, name: str, system_name: str) -> None:
    steps = added(wish(tmp_path / name, WISHES[name]), machine, live, system_name)
    rendered = render([step for step in steps if not step.packages])
    golden = GOLDEN / f"{name}-{system_name}.txt"
    if "UPDATE_GOLDEN" in os.environ:  # then read the difference, line by line
        golden.write_text(rendered)
    assert rendered == golden.read_text()


@pytest.mark.parametrize("name", WISHES)
@pytest.mark.parametrize("system_name", ["live", "installed"])
def test_they_are_bash(tmp_path: Path, machine: Machine, live: Facts, name: str, system_name: str) -> None:
    steps = added(wish(tmp_path / name, WISHES[name]), machine, live, system_name)
    plan = make_plan("", steps, [("?", True)] * len(steps))
    for script in (render_probes(steps, "/mnt"), render_apply(plan, "/mnt")):
        checked = subprocess.run(["bash", "-n"], input=script, text=True, capture_output=True)
        assert checked.returncode == 0, checked.stderr + script


def test_only_the_first_boots_network_is_made_on_the_iso(
    tmp_path: Path, machine: Machine, live: Facts
) -> None:
    for name, expected in (("firewall", False), ("timers", False), ("wifi", True)):
        steps = added(wish(tmp_path / name, WISHES[name]), machine, live, "live")
        assert bool(steps) == expected, name


def test_one_manager_has_the_network(tmp_path: Path, live: Facts) -> None:
    for name, ours, other in (
        ("wifi", "network by NetworkManager", "networkd"),
        ("timers", "unit systemd-networkd.service", "NetworkManager"),
    ):
        machine = wish(tmp_path / name, WISHES[name])
        names = [step.name for step in system(machine, installed(machine, live), NOW)]
        assert ours in names
        assert not [step for step in names if other in step and step != ours]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('[firewall]\nenabled = true\ntcp = ["0"]', ":7: firewall.tcp: '0' is not a port"),
        ('[firewall]\nenabled = true\ntcp = ["70000"]', ":7: firewall.tcp: '70000' is no port"),
        ('[firewall]\nenabled = true\nudp = ["9-8"]', ":7: firewall.udp: '9-8' is no port and no range"),
        ('[firewall]\ntcp = ["80"]', ":6: firewall.tcp: opens ports of a firewall that is not there"),
        ('[firewall]\npeers = ["10.0.0.7"]', ":6: firewall.peers: opens ports of a firewall that is not there"),
        ('[firewall]\nenabled = true\npeers = ["gpu2"]', ":7: firewall.peers: 'gpu2' is not an IPv4 address"),
        ('[firewall]\nenabled = true\npeers = ["10.0.0.7/24"]', ":7: firewall.peers: 10.0.0.7/24 has host bits set"),
        ('[firewall]\nenabled = true\npeers = ["10.0.0.300"]', ":7: firewall.peers: Octet 300 (> 255) not permitted"),
        ('[mirror]\ncountries = ["DE"]', ":6: mirror.countries: is for reflector"),
        (
            '[mirror]\nservers = ["file:///srv/$repo"]\n[timers]\nreflector = true',
            ":8: timers.reflector: would replace file:///srv/$repo",
        ),
        ("[wifi.cellar]", ":5: wifi.cellar: lacks the passphrase, a reference"),
        ('[wifi.cellar]\npassphrase = "hunter22"', ":6: wifi.cellar.passphrase holds no reference"),
        ('[wifi.cellar]\npassphrase = "env:W"\nsecurity = "open"', ':6: wifi.cellar: security = "open" takes no'),
        ('[wifi."a;b"]\nsecurity = "open"', ":5: [wifi]: 'a;b' is not a network's name"),
        (f'[wifi."{"ü" * 17}"]\nsecurity = "open"', "34 bytes; a network's name has at most 32"),
        (
            '[wifi.a]\nsecurity = "open"\n[units]\n"NetworkManager.service" = "disabled"',
            ':8: units."NetworkManager.service": NetworkManager.service disabled: nobody could reach',
        ),
        ('[units]\n"systemd-networkd.service" = "disabled"', ":6: units.\"systemd-networkd.service\""),
    ],
)  # fmt: skip
def test_what_is_refused(tmp_path: Path, text: str, expected: str) -> None:
    message = error_of(tmp_path / "own", text + "\n")
    assert expected in message
    assert message.startswith("1 error(s)")


def test_rules_of_ones_own_cannot_stand_beside_the_firewall(tmp_path: Path, live: Facts) -> None:
    machine = wish(tmp_path / "own", WISHES["firewall"] + '[files."/etc/nftables.conf"]\ntext = "a"\n')
    with pytest.raises(ProvisionError, match=r"file /etc/nftables\.conf"):
        system(machine, installed(machine, live), NOW)


def test_reflectors_list_is_not_written_back(tmp_path: Path, live: Facts) -> None:
    """Its timer would change the file, and every plan would want the old one."""
    machine = wish(tmp_path / "own", WISHES["timers"])
    for facts, ours in ((live, True), (installed(machine, live), False)):
        names = {step.name for step in system(machine, facts, NOW)}
        assert ("file /etc/pacman.d/mirrorlist" in names) == ours
        assert ("list of mirrors" in names) == (not ours)


def test_ssh_is_always_open_where_it_is_dialled_and_where_it_listens(machine: Machine) -> None:
    assert open_ports(machine) == ("22",)
    forwarded = replace(machine, ssh=replace(machine.ssh, port=2222))
    assert open_ports(forwarded) == ("22", "2222")
    assert "tcp dport { 22, 2222 } accept" in rules(forwarded)


@pytest.mark.parametrize(
    ("listens", "refused"),
    [("22", ""), ("22 6008", ""), ("2200", "2200"), ("22 5", "5"), ("", "does not say")],
)
def test_a_firewall_that_shuts_sshd_out_never_gets_its_place(
    tmp_path: Path, listens: str, refused: str
) -> None:
    """sshd is a stand-in that says on which ports it listens."""
    sshd = tmp_path / "sshd"
    sshd.write_text("#!/bin/bash\n" + "".join(f"echo port {port}\n" for port in listens.split()))
    sshd.chmod(0o755)
    script = (
        sshd_is_open(("22", "6006-6010"))
        .replace("/usr/sbin/sshd", str(sshd))
        .replace("/run/sshd", str(tmp_path / "run"))
    )
    done = subprocess.run(["bash", "-euo", "pipefail", "-c", script], capture_output=True, text=True)
    assert (done.returncode != 0) == bool(refused), done.stderr
    assert refused in done.stdout


# Two network namespaces and a cable between them: the firewall in one, who knocks in the other.
KNOCK = """
import socket, subprocess, sys, time
rules, nft, *ports = sys.argv[1:]
host = subprocess.Popen(["unshare", "--net", sys.executable, "-c", '''
import socket, sys
held = []
for port in sys.argv[1:]:
    held.append(socket.create_server(("", int(port))))
print("listening", flush=True)
sys.stdin.read()
''', *ports], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
assert host.stdout.readline() == "listening\\n"
inside = ["nsenter", "--target", str(host.pid), "--net"]
def run(*words): subprocess.run(words, check=True)
run("ip", "link", "add", "metal0", "type", "veth", "peer", "name", "metal1", "netns", str(host.pid))
run("ip", "address", "add", "10.9.9.1/24", "dev", "metal0"); run("ip", "address", "add", "10.9.9.3/24", "dev", "metal0"); run("ip", "link", "set", "metal0", "up")
run(*inside, "ip", "address", "add", "10.9.9.2/24", "dev", "metal1"); run(*inside, "ip", "link", "set", "metal1", "up")
run(*inside, "ip", "link", "set", "lo", "up")
before = socket.create_connection(("10.9.9.2", int(ports[0])), timeout=20)
for _ in range(2):  # loading it again changes nothing
    run(*inside, nft, "--file", rules)
before.sendall(b"still there")
def knock(source, port, timeout):
    try:
        socket.create_connection(("10.9.9.2", int(port)), timeout, (source, 0)).close()
        return "open"
    except TimeoutError:
        return "shut"
shut = {("10.9.9.1", ports[-1]), ("10.9.9.3", ports[-1]), ("10.9.9.3", ports[-2])}
for source in ("10.9.9.1", "10.9.9.3"):
    print(flush=True, *(f"{port} {knock(source, port, 2 if (source, port) in shut else 20)}" for port in ports))
host.stdin.close(); host.wait()
"""


@pytest.mark.skipif(not NFT or os.geteuid() != 0, reason="needs root and nftables")
def test_the_firewall_lets_in_what_is_open_and_nothing_else(tmp_path: Path) -> None:
    machine = wish(tmp_path / "own", WISHES["firewall"])
    path = tmp_path / "nftables.conf"
    path.write_text(rules(machine))
    ports = ("22", "6009", "29450", "9999")
    words = ["unshare", "--net", sys.executable, "-c", KNOCK, str(path), str(NFT), *ports]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[:2] == [
        "22 open 6009 open 29450 open 9999 shut",  # of a peer
        "22 open 6009 open 29450 shut 9999 shut",
    ]


# --- Wi-Fi ------------------------------------------------------------------------------------------------

PASSPHRASE = "  correct horse \\back $x `y` 'z' \"q\" ;#"
SECRET = Secret("env:WIFI")


def with_secret(run: Run, script: str, secret: str, step: Step) -> subprocess.CompletedProcess[str]:
    """The script with a /run of its own, where the secret lies as `send_secrets` puts it."""
    assert step.secret
    path = secret_file(step.secret)
    before = f"mount -t tmpfs tmpfs /run\nmkdir -p {path.rpartition('/')[0]}\ncat > {path} <<'END'\n{secret}\nEND\n"
    return run(before + script)


@pytest.mark.parametrize(
    "wanted", [WifiWanted(SECRET), WifiWanted(SECRET, "wpa3", True, -3)], ids=lambda wanted: wanted.security
)
def test_a_connection_is_written_once_and_never_shown(run: Run, root: Path, wanted: WifiWanted) -> None:
    step = connection("The cellar", wanted)
    path = root / FOLDER.lstrip("/") / f"{slug('The cellar')}.nmconnection"

    def observe() -> tuple[str, bool]:
        return parse_probes([step], run(render_probes([step], str(root))).stdout)[0]

    plan = make_plan("", [step], [observe()])
    assert plan
    done = with_secret(run, render_apply(plan, str(root)), PASSPHRASE, step)
    assert done.returncode == 0, done.stdout + done.stderr
    text = path.read_text()
    assert path.stat().st_mode & 0o777 == 0o600
    assert text.endswith("\npsk=\\s\\scorrect\\shorse\\s\\\\back\\s$x\\s`y`\\s'z'\\s\"q\"\\s;#\n")
    observed, _ = observe()
    assert step.is_done(observed)
    for shown in (observed, done.stdout, render_plan(make_plan("", [step], [("", False)])), step.script):
        assert "horse" not in shown
    for damage in ("psk=other", "priority"):  # another passphrase there, another setting there
        path.write_text(
            text.replace("psk=\\s", "psk=x")
            if damage == "psk=other"
            else text.replace("priority=", "priority=1")
        )
        seen, _ = observe()
        assert not step.is_done(seen), damage
        assert "horse" not in seen
    path.write_text(text)
    path.chmod(0o644)
    assert not step.is_done(observe()[0])
    path.chmod(0o600)
    assert step.is_done(observe()[0])
    other = connection("The cellar", replace(wanted, passphrase=Secret("env:OTHER")))
    assert not other.is_done(parse_probes([other], run(render_probes([other], str(root))).stdout)[0][0])


NMCLI = shutil.which("nmcli")


@pytest.mark.skipif(not NMCLI, reason="no NetworkManager on this computer")
@pytest.mark.parametrize("name", ["The cellar", 'ünï [x] #1 = "q"', "12", "12,34"])
def test_networkmanager_reads_the_same_passphrase_and_name(run: Run, root: Path, name: str) -> None:
    step = connection(name, WifiWanted(SECRET, "wpa3", True, -3))
    done = with_secret(run, render_apply(make_plan("", [step], [("", False)]), str(root)), PASSPHRASE, step)
    assert done.returncode == 0, done.stdout
    text = (root / FOLDER.lstrip("/") / f"{slug(name)}.nmconnection").read_text()
    words = [str(NMCLI), "--offline", "connection", "modify", "connection.zone", "home"]
    read = subprocess.run(words, input=text, capture_output=True, text=True)
    assert read.returncode == 0, read.stderr
    # GLib's writer escapes blanks at the beginning only, and backslashes.
    said = PASSPHRASE.replace("\\", "\\\\").replace("  c", "\\s\\sc", 1)
    for line in (
        f"psk={said}",
        f"id={name}",
        "key-mgmt=sae",
        "hidden=true",
        "autoconnect-priority=-3",
        "zone=home",
    ):
        assert line in read.stdout.splitlines()
    written = next(line for line in read.stdout.splitlines() if line.startswith("ssid=")).removeprefix(
        "ssid="
    )
    bytes_of = bytes(map(int, written.strip(";").split(";"))) if written.endswith(";") else written.encode()
    assert bytes_of == name.encode()


def test_a_passphrase_that_cannot_be_one_is_refused(run: Run, root: Path) -> None:
    step = connection("cellar", WifiWanted(SECRET))
    done = with_secret(run, render_apply(make_plan("", [step], [("", False)]), str(root)), "short", step)
    assert done.returncode != 0
    assert "has 8 to 63 characters; this one has 5" in done.stdout
    assert "short" not in done.stdout
    assert not list((root / "etc").rglob("*.nmconnection"))


def test_networks_have_files_of_their_own() -> None:
    assert len({slug(name) for name in ("a b", "a-b", "a_b", "ä b", "A b")}) == 5
    assert all(name.isascii() and "/" not in name for name in map(slug, ("../../x", "ü", ".")))
