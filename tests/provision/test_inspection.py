"""The drafted machine file: what it says of the hardware, that it loads, and that it overwrites nothing."""

import json
from dataclasses import replace
from datetime import date
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from provision.edid import Screen
from provision.errors import ProvisionError
from provision.facts import Disk, Facts, GpuSeen
from provision.inspection import choose_disk, render_draft, stranger
from provision.machine import load_machine
from tests.provision.conftest import KEY
from tests.sshd import Sshd, sshd
from tests.test_tasks import box, fab, refused

__all__ = ["box", "sshd"]

DAY = date(2026, 11, 23)
DRAFT = f"""\
#:schema ./schema.json
# gpu1, drafted on 2026-11-23 from the machine at 192.168.1.50. What is not said here is as in defaults.toml.

# firmware: UEFI
# processor: Example 9 7950X 16-Core Processor (AuthenticAMD)
# memory: 31.2 GiB
# network: enp5s0, a8:a1:59:00:00:01
# screen: DP-1, DELL U2723QE, 3840 x 2160 at 60 Hz, 597 x 336 mm, 163 dots per inch
# screen: HDMI-A-1, unnamed, says nothing of its size

[disk]
# /dev/nvme0n1  serial S4EWNX0R  931.5 GiB  Example SSD 1TB
# /dev/sda  serial STICK1  14.9 GiB  Flash Drive  (install medium)
#   /dev/sda1  0.8 GiB  iso9660 ARCH_202611  /run/archiso/bootmnt
#   not this: the install ISO runs from it
serial = "S4EWNX0R"
size_gib = 932

[user]
authorized_keys = ["{KEY}"]

[gpu]
# 0000:01:00.0: 10de:2684, Ada
# auto means nvidia-open-lts nvidia-utils: 0000:01:00.0 is 10de:2684 (Ada): open kernel modules, built for linux-lts
"""


def drafted(facts: Facts, port: int = 22) -> str:
    return render_draft("gpu1", facts, "192.168.1.50", DAY, port=port, keys=[KEY])


def test_the_draft_of_a_live_iso_says_what_is_there_and_loads(live: Facts, tmp_path: Path) -> None:
    assert drafted(live) == DRAFT
    (tmp_path / "gpu1.toml").write_text(DRAFT)
    machine = load_machine("gpu1", tmp_path)
    assert machine.disk.serial == "S4EWNX0R"
    assert machine.user.authorized_keys == (KEY,)


def test_what_is_left_to_the_person(live: Facts, tmp_path: Path) -> None:
    target = live.disks[0]
    facts = replace(live, disks=(*live.disks, replace(target, path="/dev/nvme1n1", serial="OTHER")))
    draft = drafted(facts, port=2222)
    assert '# Choose one: 2 of these disks can be installed on.\n# serial = ""' in draft
    (tmp_path / "gpu1.toml").write_text(draft)
    assert load_machine("gpu1", tmp_path, need_disk=False).ssh.port == 2222
    with pytest.raises(ProvisionError, match=r"1 error.*\n.*disk\.serial is missing"):
        load_machine("gpu1", tmp_path)


def test_without_a_key_the_draft_says_so(live: Facts) -> None:
    assert "authorized_keys" not in render_draft("gpu1", live, "", DAY)
    assert "Make one: ssh-keygen -t ed25519" in render_draft("gpu1", live, "", DAY, keys=[])


@pytest.mark.parametrize(
    "change",
    [
        {"is_medium": True},
        {"read_only": True},
        {"serial": ""},
        {"serial": "STICK1"},
        {"serial": "two\nlines"},
        {"size_bytes": 8 * 2**30},
    ],
)
def test_disks_that_are_never_chosen(live: Facts, change: dict[str, object]) -> None:
    target, stick = live.disks
    assert choose_disk(live.disks) == target
    changed = (replace(target, **change), stick)  # type: ignore[arg-type]
    assert choose_disk(changed) is None
    draft = drafted(replace(live, disks=changed))
    assert draft.count("#   not this: ") == 2
    assert "none of these can be installed on" in draft


@pytest.mark.parametrize(
    ("device", "said"),
    [(0x1B06, "580xx legacy branch"), (0x1180, "too old for any driver"), (0x2B85, "nvidia-open-lts")],
)
def test_the_driver_and_its_reason(live: Facts, device: int, said: str) -> None:
    assert said in drafted(replace(live, gpus=(GpuSeen("0000:01:00.0", device),)))
    assert "no NVIDIA card" in drafted(replace(live, gpus=()))
    assert "BIOS; refused" in drafted(replace(live, uefi=False))


ODD = st.text(st.characters(codec="utf-8"), max_size=20)


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(serial=ODD.map(str.strip), model=ODD, name=ODD, cpu=ODD)
@example(serial="two\nlines", model="\n[disk]", name="\x7f", cpu="\u2028serial = 'X'")
def test_hardware_may_call_itself_anything(
    live: Facts, tmp_path: Path, serial: str, model: str, name: str, cpu: str
) -> None:
    disk: Disk = replace(live.disks[0], serial=serial, model=model)
    screen = Screen("DP-1", name, 1, 1, 60.0, 1, 1)
    facts = replace(live, disks=(disk, *live.disks[1:]), screens=(screen,), cpu_model=cpu)
    (tmp_path / "gpu1.toml").write_text(drafted(facts))
    machine = load_machine("gpu1", tmp_path, need_disk=False)
    chosen = choose_disk(facts.disks)
    assert machine.disk.serial == (chosen.serial if chosen else "")


def test_who_is_dialled(tmp_path: Path) -> None:
    (tmp_path / "old.toml").write_text('[ssh]\naddress = "10.0.0.1"\nport = 23\n')
    dialled = [
        stranger(tmp_path, host, port, name, address)
        for host, port, name, address in (
            ("new", 22, "", ""),
            ("new", 22, "", "10.0.0.2"),
            ("10.0.0.3", 2222, "new", ""),
            ("old", 22, "", ""),
        )
    ]
    assert [(machine.name, machine.ssh.address, machine.ssh.port) for machine in dialled] == [
        ("new", "", 22),
        ("new", "10.0.0.2", 22),
        ("new", "10.0.0.3", 2222),
        ("old", "10.0.0.1", 23),
    ]
    with pytest.raises(ProvisionError, match=r"-H says that new answers at 10\.0\.0\.3, and --address"):
        stranger(tmp_path, "10.0.0.3", 22, "new", "10.0.0.4")
    with pytest.raises(ProvisionError, match="expected a host name or an IP address"):
        stranger(tmp_path, "new", 22, "", "-oProxyCommand=x")
    with pytest.raises(ProvisionError, match="cannot be a machine's name"):
        stranger(tmp_path, "10.0.0.3", 22, "../new", "")


def test_inspect_as_typed(sshd: Sshd, box: Path) -> None:
    """Both forms over a real sshd; a file that exists is printed past, not over."""
    (box / "box.toml").unlink()
    (box / "box.local.toml").unlink()
    before = sorted(box.iterdir())
    assert "no key of new is known yet" in refused(
        fab(box, "-i", str(sshd.identity), "-H", f"root@127.0.0.1:{sshd.port}", "inspect", "--name", "new")
    )
    assert sorted(box.iterdir()) == before
    arguments = ["inspect", "--name", "new", "--fingerprint", sshd.fingerprint]
    done = fab(box, "-i", str(sshd.identity), "-H", f"root@127.0.0.1:{sshd.port}", *arguments)
    assert done.returncode == 0, done.stderr
    assert f"Written to {box}/new.toml" in done.stdout
    text = (box / "new.toml").read_text()
    assert text in done.stdout
    assert "# memory: " in text
    assert f"port = {sshd.port}" in text
    assert 'address = "127.0.0.1"' in (box / "new.local.toml").read_text()
    assert json.loads((box / "schema.json").read_text())
    load_machine("new", box, need_disk=False)

    (box / "new.toml").write_text(f"# mine\n[ssh]\nport = {sshd.port}\n")
    again = fab(box, "-i", str(sshd.identity), "-H", "new", "inspect", "--fingerprint", sshd.fingerprint)
    assert again.returncode == 0, again.stderr
    assert "exists and was left as it is" in again.stdout
    assert "# memory: " in again.stdout
    assert (box / "new.toml").read_text() == f"# mine\n[ssh]\nport = {sshd.port}\n"


def test_a_name_that_ssh_configuration_translates_stays_the_machines_name(tmp_path: Path) -> None:
    (tmp_path / "config").write_text("Host gpu1\n  HostName 127.0.0.1\n")
    (tmp_path / "gpu1.toml").write_text("[disk]\nserail = 'X'\n")
    message = refused(fab(tmp_path, "-S", str(tmp_path / "config"), "-H", "gpu1", "plan"))
    assert "gpu1.toml:2: unknown key 'serail'" in message
