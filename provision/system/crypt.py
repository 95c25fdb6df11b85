"""Encryption: LUKS2 volumes, and how they are opened at boot."""

from collections.abc import Iterator

from provision.errors import ProvisionError
from provision.facts import Facts
from provision.machine import Machine
from provision.steps import File, Packages, Script, Step, secret_file
from provision.system.layout import KEY_FILE, LOOK, Part, layout

KEY_SLOT = 1  # of the volume `home`, for the key file; the passphrase is in 0
UNLOCK_KEY = "/etc/dropbear/dropbear_ed25519_host_key"
REBUILD = "in_target mkinitcpio --allpresets"
TPM_PCRS = "7"  # the firmware's Secure Boot state: a kernel or initramfs update does not lock the machine out


def check_unlock(machine: Machine, facts: Facts) -> None:
    """Refuse, before anything is wiped, what could not be opened at boot."""
    if machine.disk.unlock == "tpm2" and facts.tpm != 2:
        seen = "a TPM 1.2" if facts.tpm else "no TPM"
        raise ProvisionError(
            f'disk.unlock is "tpm2", and {facts.hostname} shows {seen}.',
            "Turn the TPM on in the firmware (often called PTT or fTPM), or choose another disk.unlock.",
        )


def volumes(machine: Machine, facts: Facts) -> Iterator[Step]:
    """Live: make the volumes and open them. What is in a locked one cannot be probed, so all of it is planned again."""
    for part in layout(machine).encrypted:
        yield encrypt(machine, part)
        yield open_volume(machine, part)


def encrypt(machine: Machine, part: Part) -> Step:
    uuid = f"cryptsetup luksUUID {part.path} 2> /dev/null"
    # Through a variable: `grep -q` would end the pipe early, and pipefail make a "no" of that.
    has_key = f"""dump=$(cryptsetup luksDump {part.path} 2> /dev/null) && [[ $dump =~ $'\\n'\\ +[0-9]+:\\ luks2 ]]"""
    return Script(
        f"encrypt {part.mapper}",
        why="LUKS2, with the passphrase of disk.passphrase",
        probe=f"{has_key} && {uuid}",
        expect=part.volume,
        # A volume without any key is one whose making was cut off: nothing can be in it.
        script=f"""{LOOK}if {has_key} || [[ $({uuid}) != {part.volume} ]]; then
  seen=$(look {part.path})
  [[ $seen == blank ]] || {{ echo "{part.path} holds $seen; if that may be lost: wipefs --all {part.path}"; exit 1; }}
fi
cryptsetup luksFormat --batch-mode --type luks2 --uuid {part.volume} --key-file {secret_file(machine.disk.passphrase)} {part.path}
udevadm settle --timeout=30""",
        secret=machine.disk.passphrase,
    )


def open_volume(machine: Machine, part: Part) -> Step:
    opened = f'cat "/sys/class/block/$(basename "$(readlink -f {part.device})")/dm/uuid"'
    return Script(
        f"open {part.mapper}",
        why=f"the encrypted {part.kind} is filled while it is open",
        probe=f"[[ -b {part.device} ]] && {opened}",
        expect=f"CRYPT-LUKS2-{part.volume.replace('-', '')}-{part.mapper}",
        script=f"""[[ ! -e {part.device} ]] || {{ echo "another volume is open as {part.device}: cryptsetup close {part.mapper}"; exit 1; }}
cryptsetup open --key-file {secret_file(machine.disk.passphrase)} {part.path} {part.mapper} || {{
  echo "disk.passphrase does not open it: it was encrypted with another one"
  exit 1
}}
udevadm settle --timeout=30""",
        secret=machine.disk.passphrase,
    )


def unlock_over_ssh(machine: Machine) -> Iterator[Step]:
    """An sshd in the initramfs, with a host key of its own, where a login is asked for the passphrase.

    https://github.com/grazzolini/mkinitcpio-dropbear: its hook takes the whole of /etc/dropbear into the image, and root_key
    as who may log in. It also takes sshd's RSA and ECDSA keys, which anybody may read there: our sshd has another.
    """
    yield Packages(
        "mkinitcpio-netconf",
        "mkinitcpio-dropbear",
        "mkinitcpio-utils",
        "dropbear",
        why="sshd in the initramfs",
    )
    yield Script(
        "host key of the initramfs",
        why="we know the machine by it before its disk is open",
        probe=f"at test -s {UNLOCK_KEY} && at test -s {UNLOCK_KEY}.pub && echo yes",
        script=f"if at test -s {UNLOCK_KEY} && at test -s {UNLOCK_KEY}.pub; then exit 0; fi\n"
        f"at install -d -m 700 {UNLOCK_KEY.rpartition('/')[0]}\nat rm -f {UNLOCK_KEY}\n"
        f"in_target dropbearkey -t ed25519 -f {UNLOCK_KEY} | grep '^ssh-ed25519 ' > \"$root\"{UNLOCK_KEY}.pub",
    )
    yield File(
        "/etc/dropbear/root_key",
        "".join(f"{key}\n" for key in machine.user.authorized_keys),
        mode=0o600,
        why="who may open the disk",
        then=REBUILD,
    )


def encryption(machine: Machine, facts: Facts) -> Iterator[Step]:
    """On the new system: what it needs to open its volumes."""
    disk, ids = machine.disk, layout(machine)
    if disk.encryption == "none":
        return
    yield Packages("cryptsetup", why="opens encrypted volumes")
    if disk.unlock == "tpm2":
        yield Packages("tpm2-tss", why="talks to the TPM, in the initramfs too")
        for part in ids.of("root"):
            yield Script(
                f"TPM2 key of {part.mapper}",
                why=f"the machine opens it by itself, as long as PCR {TPM_PCRS} (Secure Boot's state) is the same",
                # It must really open: a key of another TPM, or of another state of this one, is there too.
                probe=f"cryptsetup open --test-passphrase --token-only --token-type systemd-tpm2 {part.path} && echo yes",
                script=f"systemd-cryptenroll --wipe-slot=tpm2 --unlock-key-file={secret_file(disk.passphrase)} --tpm2-device=auto"
                f" --tpm2-pcrs={TPM_PCRS} {part.path}",
                secret=disk.passphrase,
            )
    if disk.unlock == "ssh":
        yield from unlock_over_ssh(machine)
    lines = ["# <name> <device> <key> <options>"]
    for part in ids.of("home"):
        # The key has all the entropy that it needs: no slow derivation, so that trying it costs nothing.
        fast = "--pbkdf pbkdf2 --pbkdf-force-iterations 1000"
        yield Script(
            "key of home",
            why="home opens with a key that lies on the encrypted root",
            probe=f'cryptsetup open --test-passphrase --key-slot {KEY_SLOT} --key-file "$root"{KEY_FILE} {part.path} && echo yes',
            script=f"""umask 077
mkdir -p "$root"{KEY_FILE.rpartition("/")[0]}
[[ -s "$root"{KEY_FILE} ]] || head -c 64 /dev/urandom > "$root"{KEY_FILE}
sync
cryptsetup luksKillSlot --batch-mode {part.path} {KEY_SLOT} 2> /dev/null || true
cryptsetup luksAddKey --key-slot {KEY_SLOT} {fast} --key-file {secret_file(disk.passphrase)} {part.path} "$root"{KEY_FILE}""",
            secret=disk.passphrase,
        )
        lines.append(f"home PARTUUID={part.uuid} {KEY_FILE} luks,discard,key-slot={KEY_SLOT}")
    for part in ids.of("swap"):
        lines.append(f"swap PARTUUID={part.uuid} /dev/urandom swap,discard,cipher=aes-xts-plain64,size=512")
    if len(lines) > 1:
        yield File("/etc/crypttab", "".join(f"{line}\n" for line in lines), why="opened after the root")
