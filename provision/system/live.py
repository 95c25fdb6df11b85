"""Making the live ISO fit to install from: clock, mirror, keyring."""

from collections.abc import Iterator
from shlex import join, quote

from provision.facts import Facts
from provision.machine import Machine
from provision.steps import BASE_COMPLETE, Script, Step

CLOCK_TOLERANCE_S = 60  # certificates and package signatures are checked against the clock
KEYRING_DEADLINE_S = 300

# `pacman-key --init` makes a key that vouches for the packagers'. One that was made before those came out, or that
# is of tomorrow, was made while the clock was wrong: gpg counts nothing that it signed.
KEYRING = rf"""
keys=/etc/pacman.d/gnupg
make_keyring() {{
  timeout {KEYRING_DEADLINE_S} systemctl "$1" pacman-init.service || {{
    echo "pacman-init.service, which makes the ISO's keyring, failed or took longer than {KEYRING_DEADLINE_S} s; its last words:"
    journalctl --unit pacman-init.service --lines 5 --output cat --no-pager
    exit 1
  }}
}}
# It waits for a synchronised clock; where NTP is blocked that never comes, and ours was compared by now.
install -d /run/systemd/timesync
touch /run/systemd/timesync/synchronized
make_keyring start
made=$(stat --format %Y "$keys"/private-keys-v1.d/*.key 2> /dev/null | sort --numeric-sort | head --lines 1) || true
if ((${{made:-0}} < $(stat --format %Y /usr/share/pacman/keyrings/archlinux.gpg) || made > $(date +%s))); then
  echo "the keyring was made while the clock was wrong: once more"
  gpgconf --homedir "$keys" --kill all || true
  find "$keys" -mindepth 1 -delete
  make_keyring restart
fi
"""


def clock(machine: Machine, facts: Facts, now_s: int) -> Iterator[Step]:
    """Set a clock that is wrong, and the hardware's. `now_s`: this computer's, when the facts were gathered."""
    ahead_s = now_s - facts.clock_s
    if abs(ahead_s) <= CLOCK_TOLERANCE_S:
        return
    right = f"(( $(date +%s) >= {now_s - CLOCK_TOLERANCE_S} && $(date +%s) < {now_s + 86400} ))"
    yield Script(
        "clock",
        why=f"{abs(ahead_s)} s {'behind' if ahead_s > 0 else 'ahead'}: signatures and certificates would not verify",
        probe=f"{right} && echo yes",
        # Time synchronisation may have come before us by now.
        script=f'{right} || date --set "@$(( $(date +%s) + {ahead_s} ))"\n'
        "if [[ -e /dev/rtc0 ]]; then hwclock --systohc --utc; fi",
    )


def live(machine: Machine, facts: Facts) -> Iterator[Step]:
    """Steps that change only the ISO's memory."""
    if facts.system != "live":
        return
    mirrorlist = "".join(f"Server = {server}\n" for server in machine.mirror.servers)
    yield Script(
        "mirror of the ISO",
        why=f"packages come from {machine.mirror.servers[0]}",
        probe="cat /etc/pacman.d/mirrorlist",
        expect=mirrorlist,
        script=f"{ask_mirrors(machine)}ask_mirrors\nprintf %s {quote(mirrorlist)} > /etc/pacman.d/mirrorlist",
    )
    yield from signatures(machine, "/etc/pacman.conf", "pacman.conf of the ISO")
    if machine.mirror.signatures != "Never":
        yield Script(
            "keyring of the ISO",
            why="pacstrap verifies every package; an ISO older than a packager's key needs the newer keyring",
            probe=f'[[ -e "$root"{BASE_COMPLETE} ]] && echo yes',
            # The one allowed -Sy: nothing else is installed on the ISO, which lives in memory.
            script=f"{KEYRING}{ask_mirrors(machine)}"
            "pacman -Sy --needed --noconfirm --noprogressbar archlinux-keyring || { ask_mirrors || true; exit 1; }",
        )


def ask_mirrors(machine: Machine) -> str:
    """The bash function `ask_mirrors`: it names every mirror that does not answer, and fails where none does."""
    first = (
        server.replace("$repo", "core").replace("$arch", "x86_64") + "/core.db"
        for server in machine.mirror.servers
    )
    return f"""ask_mirrors() {{
  local mirror answering=
  for mirror in {join(first)}; do
    curl --fail --silent --show-error --location --connect-timeout 20 --max-time 60 --output /dev/null --range 0-0 "$mirror" \\
      && answering=yes || echo "the mirror does not answer: $mirror"
  done
  [[ $answering ]]
}}
"""


def signatures(machine: Machine, path: str, name: str) -> Iterator[Step]:
    """SigLevel of a pacman.conf, where it is not Arch's own default."""
    wanted = machine.mirror.signatures
    if wanted == "Required DatabaseOptional":
        return
    yield Script(
        name,
        why=f"SigLevel = {wanted}, as mirror.signatures says",
        probe=f"sed -n 's/^SigLevel *= *//p' {path} | head -n 1",
        expect=wanted,
        script=f"sed -i '0,/^SigLevel *=.*/s//SigLevel = {wanted}/' {path}\ngrep -q '^SigLevel = {wanted}$' {path}",
    )
