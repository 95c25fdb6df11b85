"""The base system: packages, pacman, language, time, the person's account."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import PurePosixPath
from shlex import join, quote

from provision.errors import ProvisionError
from provision.facts import Facts
from provision.machine import Machine
from provision.steps import (
    BASE_COMPLETE,
    Directory,
    File,
    Link,
    Packages,
    Password,
    Script,
    Step,
    Unit,
    User,
)
from provision.system.crypt import check_unlock
from provision.system.layout import layout
from provision.system.live import ask_mirrors, signatures

DOWNLOADS = "var/cache/pacman/pkg"
MICROCODE = {"GenuineIntel": "intel-ucode", "AuthenticAMD": "amd-ucode"}


def base(machine: Machine, facts: Facts) -> Iterator[Step]:
    """Packages without which the machine does not boot, or cannot be reached."""
    yield Packages(
        "base",
        *machine.system.kernels,
        "linux-firmware",
        "mkinitcpio",
        "dosfstools",
        "e2fsprogs",
        "efibootmgr",
        why="boots",
    )
    if machine.disk.filesystem == "btrfs":
        yield Packages("btrfs-progs", why="checks and repairs the root, takes snapshots")
    if microcode := MICROCODE.get(facts.cpu_vendor):
        yield Packages(microcode, why=f"processor microcode for {facts.cpu_vendor}")
    yield Packages(
        "openssh", "sudo", "rsync", why="we reach it, become root on it and bring checkpoints home"
    )


def extra_packages(machine: Machine, facts: Facts) -> Iterator[Step]:
    """The person's own packages: on the running system, so that a misspelt one cannot keep it from booting."""
    if facts.system == "installed" and machine.system.packages:
        yield Packages(*machine.system.packages, why="system.packages of the machine file")


def bootstrap(packages: Step, machine: Machine) -> Step:
    """The live ISO's way to install packages: pacstrap into an empty root, pacman into one that is complete.

    An attempt that was cut off leaves half-written packages, so the root is emptied again but for what
    was downloaded. Of that a power cut may have spoiled some: pacman deletes what has a wrong checksum, and
    fails; so where there were downloads it is asked once more, and without those that were begun: a mirror that
    knows no byte ranges would refuse their rest again.
    BASE_COMPLETE is written last, after a sync: it cannot exist on an unfinished root.
    """
    keyring = "" if machine.mirror.signatures == "Never" else "-K "
    mounted = [mount.folder.lstrip("/") for mount in layout(machine).mounts if mount.folder != "/"]
    folders = [
        folder
        for place in [*mounted, DOWNLOADS]
        for folder in (place, *map(str, PurePosixPath(place).parents))
    ]
    kept = [*sorted({folder for folder in folders if folder != "."}), f"{DOWNLOADS}/*"]
    keep = " ".join(f'! -path "$root"/{quote(path) if "*" in path else path}' for path in kept)
    return replace(
        packages,
        name=f"install {packages.name}",
        probe=f'[[ -e "$root"{BASE_COMPLETE} ]] || echo unfinished\n{packages.probe}',
        script=f"""mountpoint -q "$root"
if [[ -e "$root"{BASE_COMPLETE} ]]; then
  {packages.script}
else
  [[ ! -e "$root"/etc/metal-to-model && -z $(ls -A --ignore=lost+found "$root"/home 2> /dev/null) ]] || {{
    echo "$root holds a finished installation without {BASE_COMPLETE}; if it is whole: touch $root{BASE_COMPLETE}"
    exit 1
  }}
  find "$root" -xdev -mindepth 1 -depth {keep} -delete
  find "$root/boot" -mindepth 1 -delete
  downloads=$(find "$root/{DOWNLOADS}" -type f -print -quit 2> /dev/null || true)
  install_base() {{ pacstrap {keyring}"$root" {join(packages.packages)} --noprogressbar; }}
  {ask_mirrors(machine)}
  begun() {{ find "$root/{DOWNLOADS}" -name '*.part' -delete; }}
  install_base || {{ [[ $downloads ]] && begun && install_base; }} || {{ ask_mirrors || true; exit 1; }}
  mkdir -p "$root"{BASE_COMPLETE.rpartition("/")[0]}
  sync
  touch "$root"{BASE_COMPLETE}
  sync
fi""",
    )


def pacman(machine: Machine, facts: Facts) -> Iterator[Step]:
    yield from signatures(machine, '"$root"/etc/pacman.conf', "pacman.conf")
    if machine.timers.reflector and facts.system == "installed":
        yield Script(
            "list of mirrors",
            why="which reflector writes; until then, mirror.servers",
            probe="grep -q '^Server' /etc/pacman.d/mirrorlist && echo yes",
            script=f"printf 'Server = %s\\n' {join(machine.mirror.servers)} > /etc/pacman.d/mirrorlist",
        )
        return
    yield File(
        "/etc/pacman.d/mirrorlist",
        "".join(f"Server = {server}\n" for server in machine.mirror.servers),
        why="where packages come from",
    )


def identity(machine: Machine, facts: Facts) -> Iterator[Step]:
    """What the machine is called, and whose it is."""
    hostname = machine.system.hostname
    yield File(
        "/etc/metal-to-model",
        f"{machine.name}\n",
        why="marks this installation as ours, for this machine file",
    )
    yield File(
        "/etc/hostname",
        f"{hostname}\n",
        why="the machine's name",
        then="[[ $root ]] || hostnamectl hostname " + hostname,
    )
    yield File(
        "/etc/hosts",
        f"127.0.0.1 localhost\n::1 localhost\n127.0.1.1 {hostname}\n",
        why="its own name resolves without a network",
    )


def language_and_time(machine: Machine, facts: Facts) -> Iterator[Step]:
    system = machine.system
    yield File(
        "/etc/locale.gen",
        f"{system.locale} UTF-8\n",
        why="the language to generate",
        then="in_target locale-gen",
    )
    yield File("/etc/locale.conf", f"LANG={system.locale}\n", why="language of the system")
    yield Link("/etc/localtime", f"/usr/share/zoneinfo/{system.timezone}", why="time zone")
    yield Script(
        "time zone exists",
        why="a misspelt time zone would silently mean UTC",
        probe=f"at test -e /usr/share/zoneinfo/{system.timezone} && echo yes",
        script=f"at test -e /usr/share/zoneinfo/{system.timezone} || {{ echo 'no time zone called {system.timezone}'; exit 1; }}",
    )
    yield Unit("systemd-timesyncd.service", why="keeps the clock")


def users(machine: Machine, facts: Facts) -> Iterator[Step]:
    """The one person who logs in: by key, with sudo. Root does not log in."""
    user = machine.user
    home, own = f"/home/{user.name}", f"{user.name}:{user.name}"
    # Their shell may be one of system.packages, which come later; sshd lets nobody in whose shell is missing.
    shell = user.shell if facts.system == "installed" else "/bin/bash"
    yield User(user.name, shell=shell, groups=["wheel"], why="logs in, owns the training runs")
    if user.password:
        yield Password(user.name, user.password, why="for the console and sudo, as user.password says")
    yield Directory(home, mode=0o700, owner=own, why="sshd refuses keys in a home that others may write to")
    yield Directory(
        f"{home}/.ssh", mode=0o700, owner=own, why="sshd refuses keys in a folder that others may write to"
    )
    yield File(
        f"{home}/.ssh/authorized_keys",
        "".join(f"{key}\n" for key in user.authorized_keys),
        mode=0o600,
        owner=own,
        why="the keys that log in",
        then=f'ssh-keygen -l -f "$root"{home}/.ssh/authorized_keys',  # from outside: it wants a /dev/null
    )
    yield File(
        f"/etc/sudoers.d/10-{user.name}",
        f"{user.name} ALL=(ALL:ALL) NOPASSWD: ALL\n",
        mode=0o440,
        why="the account has no password to type",
        then="in_target visudo --check --quiet",
    )


def keys_of(machine: Machine) -> str:
    """The name of the Step that decides who logs in."""
    return f"file /home/{machine.user.name}/.ssh/authorized_keys"


def check_machine(machine: Machine, facts: Facts) -> None:
    """Refuse hosts that this cannot work on, before anything is planned."""
    if facts.system == "other":
        raise ProvisionError(
            f"{facts.hostname} runs {facts.os}, and is neither the Arch install ISO nor an installation of ours.",
            "Boot the Arch install ISO on it, give root a password there with `passwd`, then run this again.",
        )
    if facts.system == "installed" and facts.owner != machine.name:
        raise ProvisionError(
            f"{facts.hostname} was installed as machine '{facts.owner}', not as '{machine.name}'.",
            f"Check ssh.address of the machine file, or use: fab -H {facts.owner} …",
        )
    if not facts.uefi:
        raise ProvisionError(
            f"{facts.hostname} was booted by a BIOS; this installs systemd-boot, which needs UEFI.",
            "Switch the firmware to UEFI and turn legacy boot (CSM) off, boot the ISO again.",
        )
    check_unlock(machine, facts)
