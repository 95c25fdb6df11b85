"""Where a secret that was used in an installation can be read afterwards: nowhere."""

from pathlib import Path

from tests.faults.install import Install

CHUNK_BYTES = 1 << 24
CONTROL = "KbdInteractiveAuthentication no\nAllowUsers "  # stands in a file: a search that misses it finds nothing else either

# The text to look for comes on stdin: in an argument it would be found in the process list.
SEARCH = r"""
export LC_ALL=C
IFS= read -r secret
shopt -s nullglob
grep --recursive --files-with-matches --text --fixed-strings --file=- --devices=skip \
  /run /var /etc /tmp /root /home /opt/metal/env/pyvenv.cfg 2> /dev/null <<< "$secret"
journalctl --all --output=export 2> /dev/null | grep --quiet --text --fixed-strings --file=<(printf '%s\n' "$secret") && echo 'the journal'
systemctl show --all '*' 2> /dev/null | grep --quiet --text --fixed-strings --file=<(printf '%s\n' "$secret") && echo 'properties of units'
cat /proc/[0-9]*/cmdline /proc/[0-9]*/environ 2> /dev/null | grep --quiet --text --fixed-strings --file=<(printf '%s\n' "$secret") && echo 'the process list'
true
"""


def find_leaks(install: Install) -> list[str]:
    """Every place, on this computer and in the machine, that holds the password of the installation as plain text.

    Looked into: all logs here, the console, every sample of the machine's processes taken while it stood still; in
    the machine its files, journal, unit properties and processes; and at last its disks byte by byte, deleted files
    and all. The machine must be on; it is off afterwards.
    """
    secret = install.secret.encode()
    found = []
    for watch in install.watches:
        install.outcome.samples += len(watch.seen)
        found += ["a process while Steps were applied" for sample in watch.seen if secret in sample]
    control, text = (
        install.inside(SEARCH, stdin=f"{line}\n", deadline_s=300)
        for line in (CONTROL.split("\n")[0], install.secret)
    )
    assert "/etc/ssh/sshd_config.d/10-metal.conf" in control, "the search in the machine finds nothing"
    found += [f"in the machine: {line}" for line in text.splitlines()]
    install.inside("sync")
    install.vm.kill()
    here = [path for path in install.vm.folder.rglob("*") if path.is_file()]
    assert any(holds(path, CONTROL.encode()) for path in install.vm.disk_paths()), (
        "the search of the disk finds nothing"
    )
    found += [str(path.relative_to(install.vm.folder)) for path in here if holds(path, secret)]
    return sorted(set(found))


def holds(path: Path, needle: bytes) -> bool:
    """Whether a file, of any size, has these bytes in it."""
    rest = b""
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            if needle in rest + chunk:
                return True
            rest = chunk[-len(needle) :]
    return False
