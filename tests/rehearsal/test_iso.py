"""The official ISO: whether a file is one, whose signature it bears, and what a machine that boots it is.

Mocked: the ISOs are made here, as archiso makes them, of random bytes; the keys are made here too. Of Arch's own only
the key is met, in the package archlinux-keyring. A real ISO was not there to be read.
"""

import os
import random
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack
from io import BytesIO, StringIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pycdlib
import pytest
from rich.console import Console

from provision.errors import ProvisionError
from provision.machine import load_machine
from provision.rehearsal import iso, loop, official, qemu, tools
from provision.rehearsal.bed import write_overlay
from provision.rehearsal.iso import Iso, check_iso
from provision.rehearsal.likeness import liken_to_real
from provision.rehearsal.official import OfficialBed
from tests.provision.conftest import KEY, machine_folder
from tests.rehearsal.images import KERNEL, Signers, make_fat, make_iso
from tests.sshd import Sshd, sshd

__all__ = ["sshd"]

BASE = f'[user]\nauthorized_keys = ["{KEY}"]\n'
RANDOM = random.Random(6)
BYTES = RANDOM.randbytes(300_000)  # of the kernel
LONG_AGO = "20200102T000000"


@pytest.fixture(scope="module")
def signers() -> Iterator[Signers]:
    """release, whom Arch trusts with the ISO; packager, who is in the same keyring; stranger; old, who has expired."""
    signers = Signers()
    try:
        for name in ("release", "packager", "stranger"):
            signers.make(name, at="20260101T120000")
        signers.make("old", expires="10d", at=LONG_AGO)
        careful = signers.make("careful", use="cert")
        signers.gpg("--quick-add-key", careful, "ed25519", "sign", "never")
        yield signers
    finally:
        signers.close()


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An ISO as mkarchiso lays it out, with files enough for a folder of several sectors."""
    folder = tmp_path_factory.mktemp("iso")
    boot = folder / "tree" / "arch/boot/x86_64"
    boot.mkdir(parents=True)
    for number in range(60):
        (boot / f"another-file-of-the-iso-{number}.img").write_bytes(b"x")
    (folder / "tree" / KERNEL).write_bytes(BYTES)
    (folder / "loader").write_bytes(b"MZ")
    efi = make_fat(folder / "efi.img", {"EFI/BOOT/BOOTX64.EFI": folder / "loader"}, spare_mib=1)
    return make_iso(folder / "archlinux-2026.11.01-x86_64.iso", folder / "tree", efi)


@pytest.fixture
def image(made: Path, tmp_path: Path) -> Path:
    """A copy that a test may spoil."""
    path = tmp_path / made.name
    path.write_bytes(made.read_bytes())
    return path


def check(image: Path, signers: Signers, signer: str = "release") -> Iso:
    people = dict.fromkeys(("release", "packager", "old", "careful", signer))
    keyring = signers.export(image.parent / "keyring.gpg", *people)
    return check_iso(image, image.parent / "log", signer=signers.fingerprint(signer), keyring=keyring)


@pytest.mark.parametrize("options", [(), ("--armor", "--detach-sign")])
def test_an_iso_with_its_signature(image: Path, signers: Signers, options: tuple[str, ...]) -> None:
    signers.sign("release", image, *options, at="20261101T120000")
    assert check(image, signers) == Iso(image, "ARCH_202611", "2026-11-01")


def test_a_subkey_signs_for_its_primary_key(image: Path, signers: Signers) -> None:
    signers.sign("careful", image)
    assert check(image, signers, "careful").label == "ARCH_202611"
    subkey = signers.gpg("--with-colons", "--list-keys", "careful@example.org").split("fpr:")[2].split(":")[8]
    keyring = image.parent / "keyring.gpg"
    with pytest.raises(ProvisionError, match=f"{signers.fingerprint('careful')} .* signed it"):
        check_iso(image, image.parent / "log", signer=subkey, keyring=keyring)


def test_of_two_signatures_one_is_enough_if_it_is_the_right_one(image: Path, signers: Signers) -> None:
    both = signers.sign("stranger", image).read_bytes() + signers.sign("release", image).read_bytes()
    image.with_name(image.name + ".sig").write_bytes(both)
    assert check(image, signers).label == "ARCH_202611"


def flip(image: Path) -> None:
    """One bit, in the last file of it."""
    content = bytearray(image.read_bytes())
    content[-1] ^= 1
    image.write_bytes(content)


@pytest.mark.parametrize(
    ("who", "text"),
    [
        ("packager", r"[0-9A-F]{40} \(packager <packager@example.org>\) signed it"),
        ("stranger", r"signed with a key that is not known here, [0-9A-F]{16}"),
        ("old", r"[0-9A-F]{40} signed it, a key that has expired\."),
    ],
)
def test_the_signature_of_another(image: Path, signers: Signers, who: str, text: str) -> None:
    signers.sign(who, image, at=LONG_AGO if who == "old" else "")
    with pytest.raises(ProvisionError, match=text) as error:
        check(image, signers)
    assert f"Expected that of {signers.fingerprint('release')}. Nothing was started." in error.value.message
    assert "https://archlinux.org/download/" in error.value.hint


def test_a_key_that_is_no_longer_good_is_not_good_for_itself(image: Path, signers: Signers) -> None:
    """gpgv says VALIDSIG of both and ends with 0."""
    signers.sign("old", image, at=LONG_AGO)
    with pytest.raises(ProvisionError, match="expired; the package archlinux-keyring may have it anew"):
        check(image, signers, "old")
    signers.make("lost")
    signers.sign("lost", image)
    signers.revoke("lost")
    with pytest.raises(ProvisionError, match="a key that is revoked"):
        check(image, signers, "lost")


def test_another_file_than_the_signed_one(image: Path, signers: Signers) -> None:
    signers.sign("release", image)
    flip(image)
    with pytest.raises(ProvisionError, match="is not what was signed"):
        check(image, signers)


@pytest.mark.parametrize("content", [b"", b"404 Not Found\n", b"\x88\x75\x04\x00"])
def test_a_file_that_is_no_signature(image: Path, signers: Signers, content: bytes) -> None:
    image.with_name(image.name + ".sig").write_bytes(content)
    with pytest.raises(ProvisionError, match="is no OpenPGP signature of a file"):
        check(image, signers)


def test_a_signed_message_is_not_a_signature_of_the_iso(image: Path, signers: Signers) -> None:
    (image.parent / "letter").write_text("I like it.\n")
    letter = signers.sign("release", image.parent / "letter", "--sign")
    letter.rename(image.with_name(image.name + ".sig"))
    with pytest.raises(ProvisionError, match="does not bear Arch's signature"):
        check(image, signers)


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        (
            "archlinux-2026.11.01-x86_64.iso",
            "curl -C - -fLo '{}.sig' https://archlinux.org/iso/2026.11.01/archlinux-2026.11.01-x86_64.iso.sig",
        ),
        (
            "archlinux-x86_64.iso",
            "curl -C - -fLo '{}.sig' https://archlinux.org/iso/latest/archlinux-x86_64.iso.sig",
        ),
        ("arch.iso", "It is beside the ISO, where that came from: https://archlinux.org/download/"),
    ],
)
def test_without_a_signature_it_is_said_where_one_is(
    made: Path, tmp_path: Path, name: str, hint: str
) -> None:
    image = tmp_path / "my downloads" / name
    image.parent.mkdir()
    image.symlink_to(made)
    with pytest.raises(ProvisionError, match=r"There is no .*sig: whether") as error:
        check_iso(image, tmp_path / "log")
    assert error.value.hint == hint.format(image)
    assert [path.name for path in image.parent.iterdir()] == [name], "nothing is made"


def test_half_a_download(image: Path, signers: Signers) -> None:
    signers.sign("release", image)
    size = image.stat().st_size
    os.truncate(image, size - 4096)
    with pytest.raises(ProvisionError, match=f"is cut short: it has {size - 4096} bytes of {size}") as error:
        check(image, signers)
    assert error.value.hint == f"curl -C - -fLo {image} {iso.MIRROR}/2026.11.01/{image.name}"


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (None, "cannot be read: No such file or directory"),
        ("folder", "cannot be read: Is a directory"),
        (b"", "is not an install ISO of Arch: it has no ISO 9660 volume"),
        (b"\x28\xb5\x2f\xfd" + bytes(100_000), "is not an install ISO of Arch: it has no ISO 9660 volume"),
    ],
)
def test_what_is_no_iso(tmp_path: Path, content: bytes | str | None, text: str) -> None:
    """Arch signs its bootstrap tarball with the same key."""
    path = tmp_path / "archlinux-x86_64.iso"
    if content == "folder":
        path.mkdir()
    elif isinstance(content, bytes):
        path.write_bytes(content)
    with pytest.raises(ProvisionError, match=text) as error:
        check_iso(path, tmp_path / "log")
    assert "https://archlinux.org/download/" in error.value.hint


def small_iso(*names: str) -> bytes:
    """An ISO by another program than the one that makes Arch's."""
    made = pycdlib.PyCdlib()
    made.new(interchange_level=3, vol_ident="SMALL", rock_ridge="1.09")
    made.add_directory("/ARCH", rr_name="arch")
    for name in names:
        made.add_fp(BytesIO(b"text"), 4, f"/ARCH/{name}.;1", rr_name=name.lower())
    found = BytesIO()
    made.write_fp(found)
    made.close()
    return found.getvalue()


def test_the_iso_of_something_else(tmp_path: Path) -> None:
    path = tmp_path / "debian.iso"
    path.write_bytes(small_iso("BOOT"))  # a file where a folder should be
    with pytest.raises(ProvisionError, match=f"is not an install ISO of Arch: there is no {KERNEL} in it"):
        check_iso(path, tmp_path / "log")


def test_spoilt_images_are_refused_and_never_crash(made: Path, tmp_path: Path) -> None:
    """Of each copy some bytes of the descriptor or of a folder are random ones. What is still found may pass."""
    good = made.read_bytes()
    root = iso.read_volume(BytesIO(good)).root.first_byte
    path = tmp_path / "spoilt.iso"
    refused = 0
    for _ in range(100):
        content = bytearray(good)
        for _ in range(RANDOM.choice((1, 16, 256))):
            begin, length = RANDOM.choice(((16 * 2048, 190), (root, 4 * 2048)))
            content[begin + RANDOM.randrange(length)] = RANDOM.randrange(256)
        path.write_bytes(content)
        try:
            iso.look_at(path)
        except ProvisionError:
            refused += 1
    assert 30 < refused < 100


def test_the_kernel_is_read_out(made: Path) -> None:
    assert iso.read_kernel(made) == BYTES


@pytest.mark.skipif(not Path(tools.arch_keyring()).exists(), reason="no archlinux-keyring here")
def test_the_key_that_is_trusted_is_the_one_that_arch_has(signers: Signers) -> None:
    """The real one, of the package archlinux-keyring: whose it is, and that it may sign."""
    keys = signers.gpg("--with-colons", "--show-keys", tools.arch_keyring()).split("\npub:")
    (key,) = [key for key in keys if f"fpr:::::::::{iso.RELEASE_KEY}:" in key]
    assert "Pierre Schmitz <pierre@archlinux.org>" in key
    assert "s" in key.split(":")[10], "it may sign"


@pytest.mark.skipif(not Path(tools.arch_keyring()).exists(), reason="no archlinux-keyring here")
def test_a_command_that_is_given_anothers_iso_starts_nothing(
    image: Path, signers: Signers, tmp_path: Path
) -> None:
    """The whole command, with Arch's own keyring: one readable error, and nothing is made."""
    signers.sign("release", image)
    machines = machine_folder(tmp_path, BASE + '[disk]\nserial = "A"\n', "box1")
    for command in (
        ("fab", "--search-root", str(loop.PROJECT), "rehearse", "box1"),
        (
            "python",
            "-m",
            "provision.rehearsal",
            "run",
            "--machine",
            "box1",
            "--cache",
            str(tmp_path / "cache"),
        ),
    ):
        cwd = tmp_path / command[0]
        cwd.mkdir()
        program = str(loop.PROJECT / ".venv" / "bin" / command[0])
        done = subprocess.run(
            [program, *command[1:], "--iso", str(image)],
            cwd=cwd,
            env={
                **os.environ,
                "METAL_MACHINES": str(machines),
                "COLUMNS": "200",
                "PYTHONPATH": str(loop.PROJECT),
            },
            capture_output=True,
            text=True,
            check=False,
        )
        said = done.stdout + done.stderr
        assert done.returncode == 1, said
        assert said.count("error:") == 1
        assert "Traceback" not in said
        assert f"signed with a key that is not known here, {signers.fingerprint('release')[-16:]}" in said
        assert not list(cwd.rglob("*.qcow2"))
        assert not list(tmp_path.rglob("vm"))


# What a machine is that boots it


def argv_of(hardware: qemu.Hardware, **options: Any) -> list[str]:
    names = ("firmware", "variables", "medium", "serial_log", "serial_socket", "qmp_socket")
    files = qemu.Files(**{name: Path(name) for name in names}, disks=(Path("a"),), seed=Path("seed.iso"))
    return qemu.arguments(hardware, files, ssh_port=2222, restore=None, **options)


def test_the_iso_is_a_cd_rom_that_the_firmware_starts_with_a_seed_beside_it() -> None:
    argv = argv_of(qemu.Hardware((qemu.Disk("A"),), qemu.TCG, optical=True), first="disk")
    devices = [argv[at + 1] for at, word in enumerate(argv) if word == "-device"]
    assert "ide-cd,bus=ide.5,id=medium-device,drive=medium,serial=MEDIUM,bootindex=9" in devices
    assert "virtio-blk-pci,drive=disk0,serial=A,bootindex=1" in devices
    assert "virtio-blk-pci,drive=seed,serial=SEED" in devices
    assert "VGA" in devices, "the ISO's console is a screen"
    assert "if=none,id=medium,format=raw,readonly=on,file=medium" in argv
    assert "if=none,id=seed,format=raw,readonly=on,file=seed.iso" in argv
    assert not {"-kernel", "-append", "-initrd"} & {*argv}, "it is booted as it is"


def test_the_stand_in_medium_is_a_disk_as_before() -> None:
    argv = argv_of(qemu.Hardware((qemu.Disk("A"),), qemu.TCG), first="medium")
    assert "virtio-blk-pci,id=medium-device,drive=medium,serial=MEDIUM,bootindex=0" in argv
    assert "VGA" not in argv


def test_mirrors_packages_and_python_are_the_persons_own(tmp_path: Path) -> None:
    text = (
        '[disk]\nserial = "nvme-X_1"\nsize_gib = 931\n[mirror]\nservers = ["https://mirror.example/$repo/os/$arch"]\n'
        '[system]\npackages = ["docker"]\ncmdline = "iommu=pt"\n[python]\ntorch = "torch==2.14.*"\n'
        '[network]\nmatch = "enp5s0"\n'
    )
    (tmp_path / "own").mkdir()
    source = machine_folder(tmp_path / "own", BASE + text, "box1")
    (source / "box1.local.toml").write_text('[ssh]\naddress = "192.0.2.7"\nidentity = "~/.ssh/box1"\n')
    wanted = load_machine("box1", source)
    likeness = liken_to_real(wanted)
    assert not likeness.stand_ins
    assert likeness.disks == (qemu.Disk("REHEARSAL0", 931),)
    bed = OfficialBed(Iso(tmp_path / "x.iso", "ARCH", "2026-11-01"), wanted, tmp_path / "cache")
    vm = SimpleNamespace(folder=tmp_path, ssh_address="127.0.0.1", ssh_port=2222)
    found = load_machine("box1", bed.write_machine_files(vm, source))  # type: ignore[arg-type]
    assert (found.mirror, found.python, found.user, found.gpu) == (
        wanted.mirror,
        wanted.python,
        wanted.user,
        wanted.gpu,
    )
    assert found.system.packages == ("docker",)
    assert found.system.cmdline.startswith("iommu=pt console=ttyS0 ")
    assert (found.ssh.address, found.ssh.port, found.ssh.identity) == ("127.0.0.1", 2222, "~/.ssh/box1")
    assert found.network.match == "en* eth*", "the interface of the virtual machine has another name"
    said = "\n".join(likeness.differences)
    assert "disk nvme-X_1 is called REHEARSAL0" in said
    assert "network.match is en* eth* in place of enp5s0" in said
    assert "no GPU: nothing of NVIDIA is installed" in said


def test_an_iso_that_took_no_seed_is_told_from_one_that_is_silent(
    tmp_path: Path, sshd: Sshd, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Mocked: a server on loopback in place of the ISO's, with keys of its own as the ISO makes them at boot."""
    monkeypatch.setattr(official, "BOOT_S", 1)
    (tmp_path / "own").mkdir()
    source = machine_folder(tmp_path / "own", BASE + '[disk]\nserial = "A"\n', "box1")
    write_overlay(tmp_path / "machines", source, "box1", "", "")
    bed = OfficialBed(Iso(tmp_path / "x.iso", "ARCH", "2026-11-01"), load_machine("box1", source), tmp_path)
    vm: Any = SimpleNamespace(
        folder=tmp_path, ssh_address="127.0.0.1", ssh_port=sshd.port, check=lambda: None
    )
    pins = tmp_path / "machines" / "known_hosts"
    pins.write_text(f"box1.live {KEY}\n")
    with pytest.raises(
        ProvisionError, match=f"{sshd.fingerprint}.*did not take the seed".replace("+", r"\+")
    ):
        bed.wait(vm)
    pins.write_text(f"box1.live {sshd.host_key}\n")
    bed.wait(vm)
    sshd.stop_listening()
    with pytest.raises(ProvisionError, match=r"in vain for SSH at") as error:
        bed.wait(vm)
    assert "seed" not in error.value.message


# What a person is told who leaves the machine on


class Fails:
    """Mocked: a bed whose machine comes up and whose `provision` fails; it is switched off after the second look."""

    programs = (tools.Tool("/", "", ""),)
    likeness = None
    person = None
    accelerator = qemu.TCG
    trust = ()
    provision_deadline_s = 1.0

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.log = folder / "log"
        self.looks = iter([True, True])
        fails = self

        class Machine(SimpleNamespace):
            @property
            def running(self) -> bool:
                return next(fails.looks, False)

        self.vm = Machine(
            folder=folder, hardware=qemu.Hardware((), qemu.TCG), claim=lambda: None, check=lambda: None
        )

    def __enter__(self) -> "Fails":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def machine(self, *_: object, **__: object) -> Any:
        return self.vm

    def prepare(self, vm: object) -> None:
        pass

    def describe(self) -> list[str]:
        return ["nothing"]

    def write_machine_files(self, *_: object) -> None:
        pass

    def boot_live(self, *_: object, **__: object) -> None:
        raise ProvisionError("What went wrong.", "What to do.")


@pytest.mark.parametrize("keep", [True, False])
def test_a_failure_is_told_before_the_machine_is_left_on(tmp_path: Path, keep: bool) -> None:
    output = StringIO()
    bed: Any = Fails(tmp_path)
    with ExitStack() as stack:
        caught = stack.enter_context(pytest.raises(ProvisionError))
        loop.go(bed, "x", (), "again", Console(file=output, width=100), resume=False, cold=True, keep=keep)
    said = output.getvalue()
    assert caught.value.hint == "What to do.\nGo on from here: again"
    assert ("stays on until Ctrl-C" in said) == keep
    if keep:
        assert said.index("error: Phase 'boot' failed. What went wrong.") < said.index(
            "stays on until Ctrl-C"
        )
        assert "What went wrong." not in caught.value.message, "it was said"
    else:
        assert "What went wrong." in caught.value.message
