"""A person's own machine file in a machine: Wi-Fi's NetworkManager, firewall, hardened sshd, desktop, their own things.

Stand-ins: the desktop's programs, the greeter, and every package that the bed lacks have nothing in them.
"""

import os
import socket
import subprocess
import time
from contextlib import suppress
from pathlib import Path

import pytest
from rich.console import Console

from provision.flow import provision_machine
from provision.host import connect
from provision.machine import load_machine
from provision.rehearsal import qemu
from provision.rehearsal.bed import Bed
from provision.rehearsal.loop import Rehearsal, fab_command
from provision.rehearsal.vm import free_port, wait_until
from tests.rehearsal.conftest import CACHE
from tests.rehearsal.hardware import forget
from tests.rehearsal.test_layouts import installed
from tests.sshd import Proxy

pytestmark = [pytest.mark.rehearsal, pytest.mark.rotating]

SECRETS = {"WIFI": "correct-horse", "ADA": "battery-staple"}
BASE = """
[user]
name = "ada"
authorized_keys = ["{key}"]
password = "env:ADA"

[packages]
editors = ["neovim"]

[files."/etc/motd"]
source = "motd"
template = true

[lines.colour]
file = "/etc/pacman.conf"
line = "Color"
match = "^#? *Color$"
"""
BOX1 = """
extends = ["base"]

[disk]
serial = "S6XYNX0T123456"
size_gib = 931
filesystem = "btrfs"
data = ["WD-ARCHIVE /archive"]

[system]
groups = ["gnome"]

[sshd]
hardened = true

[firewall]
enabled = true
tcp = ["8080"]

[timers]
fstrim = true
paccache = true
reflector = true

[desktop]
kind = "sway"

[folders."/srv/models"]
owner = "ada:ada"
mode = "2775"

[links]
"~/models" = "/srv/models"

[users.guest]
groups = ["video", "docker"]
authorized_keys = ["{key}"]

[units]
"docker.service" = "enabled"

[sysctl]
"vm.swappiness" = "10"

[wifi."The cellar"]
passphrase = "env:WIFI"
"""
# One line each; a number at the end is said by nobody but the machine that was asked.
SEEN = r"""
systemctl is-active NetworkManager nftables greetd docker fstrim.timer paccache.timer reflector.timer | sort | uniq -c
systemctl is-active systemd-networkd || true
systemctl is-system-running --wait || systemctl --failed --no-legend --plain
nmcli --terse --fields NAME,TYPE connection show | grep wireless
nmcli --terse --fields TYPE,STATE device | grep ethernet
sshd -T | grep -E '^(passwordauthentication|allowagentforwarding) '
cat /etc/motd /proc/sys/vm/swappiness
grep -c '^Color$' /etc/pacman.conf
stat --format '%U %a %F' /srv/models
readlink /home/ada/models
id --name --groups guest
findmnt --noheadings --raw --output SOURCE,TARGET /archive
lsblk --noheadings --bytes --nodeps --output SIZE,SERIAL
stat --format '%a' /etc/NetworkManager/system-connections/*
"""


def answers(rehearsal: Rehearsal, guest_port: int) -> bool:
    """Whether a server of the guest, started for it, is reached from outside."""
    vm, port = rehearsal.vm, free_port()
    serve = f"systemd-run --quiet --collect --unit=serve-{guest_port} python3 -m http.server {guest_port}"
    installed(
        rehearsal,
        f"{serve}; for i in {{1..300}}; do curl -so /dev/null localhost:{guest_port} && break; sleep 0.2; done",
        "ada",
    )
    assert vm.qmp
    rule = f"{qemu.NETWORK} {qemu.forward(qemu.LOOPBACK, port)}"
    vm.qmp.command("human-monitor-command", **{"command-line": f"hostfwd_add {rule}-:{guest_port}"})
    try:
        with suppress(OSError), socket.create_connection((qemu.LOOPBACK, port), timeout=20) as connection:
            connection.sendall(b"GET / HTTP/1.0\r\n\r\n")
            return connection.recv(4) == b"HTTP"
        return False
    finally:
        vm.qmp.command("human-monitor-command", **{"command-line": f"hostfwd_remove {rule}"})


def test_a_persons_own_machine_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bed: Bed) -> None:
    key = f"{bed.parts.keys.identity}.pub"
    (tmp_path / "base.toml").write_text(BASE.replace("{key}", key))
    (tmp_path / "box1.toml").write_text(BOX1.replace("{key}", key))
    (tmp_path / "files").mkdir()
    (tmp_path / "files/motd").write_text("This is ${system.hostname}, of ${user.name}.\n")
    monkeypatch.setenv("METAL_MACHINES", str(tmp_path))
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    machine = load_machine("box1", tmp_path)
    with Bed(CACHE, person=machine, on_build=lambda name: print(f"building {name}")) as own:
        assert own.likeness
        vm = own.machine("of-box1", own.likeness.disks)
        rehearsal = Rehearsal(own, vm, Console(quiet=True))
        try:
            rehearsal.boot(cold=False)
            rehearsal.provision()
            check(rehearsal)
            boot_id = "cat /proc/sys/kernel/random/boot_id"
            before = installed(rehearsal, boot_id, "ada")
            with suppress(AssertionError):  # the connection goes with the machine
                installed(rehearsal, "systemctl reboot", "ada")

            def rebooted() -> bool:
                with suppress(AssertionError, subprocess.TimeoutExpired):
                    return installed(rehearsal, boot_id, "ada") != before
                return False

            wait_until(rebooted, vm.check, 600, "the machine after its restart")
            check(rehearsal)
            unchanged_at_40_ms(rehearsal)
        finally:
            forget(vm)


def unchanged_at_40_ms(rehearsal: Rehearsal) -> None:
    """`provision` where nothing is to do, over a slow line; prints what it costs."""
    path = rehearsal.machines / "box1.local.toml"
    proxy = Proxy(rehearsal.vm.ssh_port, delay_s=0.02)
    text = path.read_text()
    path.write_text(text.replace(f"port = {rehearsal.vm.ssh_port}", f"port = {proxy.port}"))
    machine, pins = load_machine("box1", rehearsal.machines), rehearsal.machines / "known_hosts"
    assert machine.ssh.port == proxy.port
    try:
        # The first time the firewall opens the port at which sshd is dialled now.
        for task, changes in (("provision", True), ("plan", False), ("provision", False)):
            began = time.monotonic()
            done = subprocess.run(
                fab_command(task, name="box1"),
                capture_output=True,
                text=True,
                env={**os.environ, **rehearsal.environment},
                check=False,
            )
            print(f"{task}: {time.monotonic() - began:.1f} s at 40 ms")
            assert done.returncode == 0, done.stdout + done.stderr
            assert changes or "nothing to do" in done.stdout.lower(), done.stdout
        with connect(machine, pins) as host:
            again = provision_machine(machine, host, pins, "", Console(quiet=True))
            assert again is host
            print(f"provision: {host.traffic}")
            assert host.traffic.execs == 3  # facts, probes, proof
    finally:
        path.write_text(text)
        proxy.close()


def check(rehearsal: Rehearsal) -> None:
    seen = installed(rehearsal, SEEN, "ada")
    for wanted in (
        "7 active",
        "\ninactive\n",
        "\nrunning\n",
        "The cellar:802-11-wireless",
        "ethernet:connected",
        "passwordauthentication no",
        "allowagentforwarding no",
        "This is box1, of ada.\n10\n1\nada 2775 directory\n/srv/models\n",
        "guest video docker",
        "/archive\n",
        f"{931 << 30} S6XYNX0T123456",
        f"{64 << 30} WD-ARCHIVE",
        "\n600\n",
    ):
        assert wanted in seen, f"{wanted!r} is not in:\n{seen}"
    assert answers(rehearsal, 8080), "the machine file opens it"
    assert not answers(rehearsal, 9999), "nothing opens it"
    for secret in SECRETS.values():
        everywhere = "cat /proc/*/cmdline | tr '\\0' ' '; journalctl --boot --no-pager"
        assert secret not in installed(rehearsal, f"{{ {everywhere}; }} 2> /dev/null || true", "ada")
