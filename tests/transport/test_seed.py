"""The seed: what is in the image, that it lets us in with nothing typed, and that no pin is ever silently wrong."""

import stat
import subprocess
from pathlib import Path

import pycdlib
import pytest
import yaml

from provision.errors import ProvisionError, UnknownKey
from provision.host import connect
from provision.machine import Machine, load_stranger
from provision.pins import fingerprint_of, load_pins, pin
from provision.seed import load_keys, make_host_key, read_image, render_seed, save_seed
from tests.sshd import Sshd, keygen
from tests.test_tasks import fab, refused

KEY = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAILk8sBjPpxKyQFJkHTmi7t2bD9yVKGVlbjhaWFHWnbkL me: at#home"


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A person's home with one key."""
    home = tmp_path / "home"
    (home / ".ssh").mkdir(parents=True)
    keygen(home / ".ssh" / "id_ed25519")
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.delenv("SSH_AUTH_SOCK", raising=False)
    return home


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """For machine files; empty: a seed is made before the machine was ever seen."""
    folder = tmp_path / "machines"
    folder.mkdir()
    return folder


@pytest.fixture
def machine(home: Path, folder: Path) -> Machine:
    return load_stranger("box", folder)


def user_data(image: Path) -> dict[str, object]:
    text = read_image(image)["user-data"]
    assert text.startswith("#cloud-config\n"), "by this line cloud-init knows what it is"
    values = yaml.safe_load(text)
    assert isinstance(values, dict)
    return values


def test_the_image_is_what_cloud_init_looks_for(machine: Machine, folder: Path, tmp_path: Path) -> None:
    image = tmp_path / "seed.iso"
    made = save_seed(machine, [KEY], folder / "known_hosts", image)
    assert stat.S_IMODE(image.stat().st_mode) == 0o600, "it holds a private key"
    assert image.stat().st_size % 2048 == 0
    seen = subprocess.run(
        ["/usr/sbin/blkid", "-p", "-o", "export", image], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    assert {"LABEL=CIDATA", "TYPE=iso9660"} <= set(seen), "DataSourceNoCloud asks blkid for both"
    names = {"meta-data", "user-data", "network-config"}
    iso = pycdlib.PyCdlib()
    iso.open(str(image))
    joliet = {child.file_identifier().decode("utf-16-be") for child in iso.list_children(joliet_path="/")}
    rock_ridge = {
        child.rock_ridge.name().decode() for child in iso.list_children(rr_path="/") if child.is_file()
    }
    iso.close()
    assert names <= joliet
    assert names == rock_ridge
    wanted = user_data(image)
    (user,) = wanted["users"]  # type: ignore[misc]
    assert user["name"] == "root"
    assert user["ssh_authorized_keys"] == [KEY], "a comment that YAML could misread"
    assert user["lock_passwd"] is False
    assert wanted["disable_root"] is False
    assert wanted["bootcmd"] == [["sh", "-c", "echo box > /proc/sys/kernel/hostname"]]
    assert wanted["ssh_pwauth"] is False
    assert wanted["ssh_keys"]["ed25519_public"] == f"{made.public} box"  # type: ignore[index]
    assert load_pins(folder / "known_hosts") == {"box.live": made.public}


def test_the_two_halves_of_the_host_key_are_of_one_key(
    machine: Machine, folder: Path, tmp_path: Path
) -> None:
    """By OpenSSH's own reading of what cloud-init will write."""
    made = save_seed(machine, [KEY], folder / "known_hosts", tmp_path / "seed.iso")
    private = tmp_path / "private"
    private.touch(0o600)
    private.write_text(user_data(tmp_path / "seed.iso")["ssh_keys"]["ed25519_private"])  # type: ignore[index]
    shown = subprocess.run(["ssh-keygen", "-y", "-f", private], capture_output=True, text=True, check=True)
    assert " ".join(shown.stdout.split()[:2]) == made.public


def test_the_instance_changes_with_the_content(machine: Machine) -> None:
    key = make_host_key()
    first, again, other = (
        yaml.safe_load(render_seed(machine, keys, key)["meta-data"]) for keys in ([KEY], [KEY], [KEY, KEY])
    )
    assert first == again
    assert first["instance-id"] != other["instance-id"]
    assert first["local-hostname"] == "box", "by which it answers in mDNS"
    assert "PRIVATE" not in repr(key)


def test_whom_it_lets_in(home: Path, folder: Path) -> None:
    own = " ".join((home / ".ssh" / "id_ed25519.pub").read_text().split()[:2])
    (folder / "box.toml").write_text(f"[user]\nauthorized_keys = ['{KEY}']\n")
    assert load_keys(load_stranger("box", folder), []) == [KEY, own]
    (folder / "box.toml").unlink()
    (home / ".ssh" / "id_ed25519.pub").unlink()
    (home / ".ssh" / "id_ed25519").unlink()
    with pytest.raises(ProvisionError, match="no public key to let in"):
        save_seed(load_stranger("box", folder), [], folder / "known_hosts", folder / "seed.iso")
    assert not (folder / "known_hosts").exists()


# A second seed


def test_the_key_of_the_image_that_is_there_is_kept(machine: Machine, folder: Path, tmp_path: Path) -> None:
    pins, image = folder / "known_hosts", tmp_path / "seed.iso"
    first = save_seed(machine, [KEY], pins, image)
    second = save_seed(machine, [KEY, KEY], pins, image)
    assert (first.kept, second.kept) == (False, True)
    assert second.public == first.public == load_pins(pins)["box.live"]
    assert len(user_data(image)["users"][0]["ssh_authorized_keys"]) == 2  # type: ignore[index]


def test_without_it_the_pin_is_the_new_one(machine: Machine, folder: Path, tmp_path: Path) -> None:
    pins = folder / "known_hosts"
    first = save_seed(machine, [KEY], pins, tmp_path / "one.iso")
    second = save_seed(machine, [KEY], pins, tmp_path / "two.iso")
    assert second.public != first.public
    assert load_pins(pins)["box.live"] == second.public
    third = save_seed(machine, [KEY], pins, tmp_path / "one.iso")
    assert not third.kept, "its key is not the pinned one any more"
    assert load_pins(pins)["box.live"] == third.public


def test_an_image_of_another_machine_gives_no_key(folder: Path, home: Path, tmp_path: Path) -> None:
    pins, image = folder / "known_hosts", tmp_path / "seed.iso"
    other = save_seed(load_stranger("other", folder), [KEY], pins, image)
    made = save_seed(load_stranger("box", folder), [KEY], pins, image)
    assert not made.kept
    assert made.public != other.public


def test_a_file_that_is_no_seed_is_not_overwritten(machine: Machine, folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "archlinux.iso"
    for content in (b"", b"x" * 100000, bytes(3 << 20)):
        other.write_bytes(content)
        with pytest.raises(ProvisionError, match="is not a seed: it was left as it is"):
            save_seed(machine, [KEY], folder / "known_hosts", other)
        assert other.read_bytes() == content
    with pytest.raises(ProvisionError, match="is not a file"):
        save_seed(machine, [KEY], folder / "known_hosts", tmp_path)
    with pytest.raises(ProvisionError, match="cannot be written"):
        save_seed(machine, [KEY], folder / "known_hosts", tmp_path / "no" / "folder")
    assert not (folder / "known_hosts").exists()


# The first contact


@pytest.fixture
def seeded(sshd: Sshd, home: Path, tmp_path: Path) -> Sshd:
    """A server with exactly what cloud-init takes out of the image."""
    folder = tmp_path / "machines"
    folder.mkdir()
    done = fab(folder, "seed", "box", "--out", str(tmp_path / "seed.iso"))
    assert done.returncode == 0, done.stderr
    assert "dd if=" in done.stdout
    assert "fab -H box inspect" in done.stdout
    assert "PRIVATE" not in done.stdout + done.stderr
    wanted = user_data(tmp_path / "seed.iso")
    (sshd.folder / "host_key").write_text(wanted["ssh_keys"]["ed25519_private"])  # type: ignore[index]
    (sshd.folder / "host_key.pub").write_text(wanted["ssh_keys"]["ed25519_public"])  # type: ignore[index]
    keys = wanted["users"][0]["ssh_authorized_keys"]  # type: ignore[index]
    sshd.path("/run/sshd/authorized_keys").write_text("\n".join(keys) + "\n")
    sshd.restart()
    return sshd


def test_the_first_contact_needs_nothing(seeded: Sshd, tmp_path: Path) -> None:
    pins = tmp_path / "machines" / "known_hosts"
    with connect(seeded.machine(identity=False), pins) as host:
        assert (host.system, host.user) == ("live", "root")
    seeded.swap_host_key()  # an ISO that was booted without the seed
    with pytest.raises(UnknownKey) as caught:
        connect(seeded.machine(identity=False), pins)
    assert fingerprint_of(load_pins(pins)["box.live"]) in caught.value.message


def test_the_task_refuses_what_it_cannot_mean(folder: Path, home: Path) -> None:
    assert "takes the machine's name instead of -H" in refused(fab(folder, "-H", "box", "seed", "box"))
    assert "cannot be a machine's name" in refused(fab(folder, "seed", "../box"))
    assert not (folder / "known_hosts").exists()


def test_a_pin_of_an_earlier_boot_is_replaced(machine: Machine, folder: Path, tmp_path: Path) -> None:
    pins = folder / "known_hosts"
    pin(pins, "box.live", keygen(tmp_path / "old").with_suffix(".pub").read_text())
    pin(pins, "box", keygen(tmp_path / "installed").with_suffix(".pub").read_text())
    installed = load_pins(pins)["box"]
    made = save_seed(machine, [KEY], pins, tmp_path / "seed.iso")
    assert load_pins(pins) == {"box": installed, "box.live": made.public}
