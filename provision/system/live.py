"""Making the live ISO fit to install from: clock, mirror, keyring."""

from collections.abc import Iterator
from shlex import quote

from provision.facts import Facts
from provision.machine import Machine
from provision.steps import BASE_COMPLETE, Script, Step

CLOCK_TOLERANCE_S = 60  # certificates and package signatures are checked against the clock


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
    first = machine.mirror.servers[0].replace("$repo", "core").replace("$arch", "x86_64") + "/core.db"
    yield Script(
        "mirror of the ISO",
        why=f"packages come from {machine.mirror.servers[0]}",
        probe="cat /etc/pacman.d/mirrorlist",
        expect=mirrorlist,
        script="curl --fail --silent --show-error --location --connect-timeout 20 --output /dev/null --range 0-0"
        f" {quote(first)} || {{ echo {quote(f'the mirror does not answer: {first}')}; exit 1; }}\n"
        f"printf %s {quote(mirrorlist)} > /etc/pacman.d/mirrorlist",
    )
    yield from signatures(machine, "/etc/pacman.conf", "pacman.conf of the ISO")
    if machine.mirror.signatures != "Never":
        yield Script(
            "keyring of the ISO",
            why="pacstrap verifies every package; an ISO older than a packager's key needs the newer keyring",
            probe=f'[[ -e "$root"{BASE_COMPLETE} ]] && echo yes',
            # The one allowed -Sy: nothing else is installed on the ISO, which lives in memory.
            # It waits for a synchronised clock; where NTP is blocked that never comes, and ours was compared by now.
            script="install -d /run/systemd/timesync; touch /run/systemd/timesync/synchronized\n"
            "timeout 300 systemctl start pacman-init.service ||"
            " { echo 'pacman-init.service did not finish within 300 s'; systemctl status --no-pager pacman-init.service; exit 1; }\n"
            "pacman -Sy --needed --noconfirm --noprogressbar archlinux-keyring",
        )


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
