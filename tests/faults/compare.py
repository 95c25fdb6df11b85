"""What an installed machine is made of, as text that two machines can be compared by."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

State = Mapping[str, Mapping[str, str]]  # section → key → value

# Run as root in the installed system. Paths are printed with mode, owner, and the hash of a file or the target of a
# link; below /usr and in the environment the size stands for the hash, as hashing gigabytes takes long there.
COLLECT = r"""
export LC_ALL=C.UTF-8
section() { printf '@@section %s\n' "$1"; }
hashed() {  # paths…
  find "$@" -xdev ! -type f -printf '%p\t%y %m %U:%G %l\n'
  find "$@" -xdev -type f -printf '%m %U:%G %p\0' | while IFS= read -r -d '' line; do
    path=${line#* * }
    printf '%s\t%s %s\n' "$path" "${line%" $path"}" "$(sha256sum < "$path")"
  done
}
section packages; pacman -Q | tr ' ' '\t'
section 'asked for'; pacman -Qeq | sed 's/$/\tyes/'
section 'files that packages miss'; pacman -Qk 2> /dev/null | grep -v ', 0 missing files$' | sed 's/: /\t/'
section 'pacman at work'; ls /var/lib/pacman/db.lck 2> /dev/null | sed 's/$/\tlocked/'
section files
hashed /etc /boot /usr/local /var/lib/metal-to-model /home /root /opt/metal/env /var/lib/systemd/linger 2> /dev/null
hashed $(find / -xdev \( -name '*.metal-new' -o -name '*.pacnew' -o -name '*.pacsave' -o -name '*.part' \) 2> /dev/null) /dev/null
section sizes
find /usr /opt -xdev -path /opt/metal/cache -prune -o ! -type d -printf '%p\t%y %m %U:%G %s %l\n'
find /usr /opt -xdev -path /opt/metal/cache -prune -o -type d -printf '%p\t%y %m %U:%G\n'
section units; systemctl list-unit-files --plain --no-legend --no-pager | awk '$2 != "transient" { print $1 "\t" $2 }'
section 'failed units'; systemctl list-units --failed --plain --no-legend --no-pager | awk '{ print $1 "\tfailed" }'
section 'running services'
systemctl list-units --type=service --state=running --plain --no-legend --no-pager | awk '{ print $1 "\trunning" }'
section mounts; findmnt --real --noheadings --raw --output TARGET,SOURCE,FSTYPE,OPTIONS | sed 's/ /\t/'
section 'boot entries'
efibootmgr --verbose | sed -n 's/^Boot\([0-9A-F]\{4\}\)\*\? \(Linux Boot Manager.*\)/\2/p' | sort | uniq --count | sed 's/^ *\([0-9]*\) \(.*\)/\2\t\1/'
section 'first in the boot order'
first=$(efibootmgr | sed -n 's/^BootOrder: \([0-9A-F]*\).*/\1/p')
efibootmgr | sed -n "s/^Boot$first\*\? *\([^\t]*\).*/\1\tfirst/p"
section accounts; getent passwd | sed 's/:/\t/'
section groups; getent group | sed 's/:/\t/'
section partitions; lsblk --noheadings --raw --output NAME,SIZE,FSTYPE,LABEL,PARTUUID,PARTLABEL | sed 's/ /\t/'
section 'state that should be gone'; find /run/metal/secrets /var/lib/metal-to-model/then -mindepth 1 2> /dev/null | sed 's/$/\tthere/'
section end
"""

# Two machines that nobody disturbed differ in these. Nothing else may differ.
EXCLUDED: tuple[tuple[str, str, str], ...] = (
    ("files", r"/etc/ssh/ssh_host_.*", "host keys are made on the machine"),
    ("files", r"/etc/machine-id", "made on the machine"),
    ("files", r"/boot/loader/random-seed", "changes with every boot"),
    ("files", r"/etc/pacman\.d/gnupg(/.*)?", "the keyring has a key made on the machine"),
    ("files", r"/etc/shadow-?", "salts of passwords"),
    ("files", r"/var/lib/metal-to-model/password/.*", "a digest of a salted hash"),
    ("files", r"/etc/ld\.so\.cache", "a cache"),
    ("files", r"/etc/\.updated", "a time"),
    ("files", r"/etc/(passwd|group|gshadow|subuid|subgid|shells)-", "copies of the edit before"),
)  # fmt: skip


def parse_state(text: str) -> dict[str, dict[str, str]]:
    """The output of COLLECT; ValueError where it is cut short."""
    state: dict[str, dict[str, str]] = {}
    section: dict[str, str] = {}
    for line in text.splitlines():
        if line.startswith("@@section "):
            section = state.setdefault(line.removeprefix("@@section "), {})
        elif line:
            key, _, value = line.partition("\t")
            section[key] = value.strip()
    if "end" not in state:
        raise ValueError("what the machine says of itself is cut short")
    del state["end"]
    return state


@dataclass(frozen=True)
class Difference:
    """`before` or `now` is None where the key is not there at all."""

    section: str
    key: str
    before: str | None
    now: str | None

    def __str__(self) -> str:
        return f"{self.section}: {self.key}: {self.before or 'not there'} → {self.now or 'not there'}"


def differences(
    wanted: State, seen: State, excluded: Sequence[tuple[str, str, str]] = EXCLUDED
) -> list[Difference]:
    """What `seen` has otherwise than `wanted`, without what is excluded."""
    found = []
    for section in dict.fromkeys([*wanted, *seen]):
        before, now = wanted.get(section, {}), seen.get(section, {})
        for key in sorted({*before, *now}):
            if before.get(key) != now.get(key) and not is_excluded(section, key, excluded):
                found.append(Difference(section, key, before.get(key), now.get(key)))
    return found


def is_excluded(section: str, key: str, excluded: Sequence[tuple[str, str, str]]) -> bool:
    return any(name == section and re.fullmatch(pattern, key) for name, pattern, _ in excluded)
