"""A watcher inside the machine: it freezes the unit that applies Steps once a wanted Step has begun.

The product has no hooks for it. The unit's log is followed where the product writes it, and its control group is
frozen by the kernel (cgroup v2), so the machine stands still in a known Step until it is told to go on.
"""

import base64
import queue
import shlex
import subprocess
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

from provision.apply import UNIT
from provision.rehearsal import tools
from provision.units import folder_of
from tests.faults.cuts import parse_marker

# Each wanted Step maps to how long to wait in it, and then between one place in it and the next. `@@for`: the wanted
# one; `@@seen`: command line and environment of every process; `@@at`: the one at work in truth, as a short one may
# have ended. That comes last: once it is read, the power may go.
WATCH = r"""
export LC_ALL=C.UTF-8
log=$folder/log
freeze=/sys/fs/cgroup/system.slice/$unit.service/cgroup.freeze
install -d -m 711 "${folder%/*}"
[[ -d $folder ]] || mkdir -m 700 "$folder"
[[ -e $log ]] || : > "$log"
exec 3<&0
echo @@ready
tail --lines=0 --sleep-interval=0.1 --follow=name --retry "$log" 2> /dev/null < /dev/null | while IFS= read -r line; do
  [[ $line == '@@begin '* ]] || continue
  name=${line#@@begin * }
  for wait in ${wanted[$name]-}; do
    [[ $wait == 0.0 ]] || sleep "$wait"
    { echo 1 > "$freeze"; } 2> /dev/null || break
    for ((tries = 0; tries < 300; tries++)); do
      [[ $(< "${freeze%freeze}events") != *'frozen 1'* ]] || break
      sleep 0.01
    done
    echo "@@for $name"
    echo "@@seen $(cat /proc/[0-9]*/cmdline /proc/[0-9]*/environ 2> /dev/null | base64 --wrap=0)"
    echo "@@at $(grep -a '^@@' "$log" | tail -n 1)"
    read -r word <&3
    { echo 0 > "$freeze"; } 2> /dev/null
    unset 'wanted[$name]'
  done
done
"""


def render_watch(wanted: Mapping[str, Sequence[float]]) -> str:
    """The watcher's bash. `wanted`: Step → seconds after its begin, rising."""
    pairs = []
    for name, places in wanted.items():
        gaps = [round(later - sooner, 3) for sooner, later in zip((0.0, *places), places, strict=False)]
        pairs.append(f"[{shlex.quote(name)}]={shlex.quote(' '.join(str(float(gap)) for gap in gaps))}")
    return (
        f"unit={UNIT}\nfolder={shlex.quote(str(folder_of(UNIT)))}\n"
        f"declare -A wanted=({' '.join(pairs)})\n{WATCH}"
    )


@dataclass(frozen=True)
class Frozen:
    """The unit stands still for the sake of Step `wanted`: in the Step `during`, or after the one numbered `ended`."""

    watch: "Watch"
    wanted: str
    during: str
    ended: str = ""


class Watch:
    """One watcher, from its start to the end of the connection to the machine. Reports go to `events`."""

    def __init__(
        self, ssh: Sequence[str], wanted: Mapping[str, Sequence[float]], events: "queue.Queue[object]"
    ) -> None:
        self.events = events
        self.seen: list[bytes] = []
        self.ready = threading.Event()
        command = f"bash --norc --noprofile -c {shlex.quote(render_watch(wanted))}"
        if "root@" not in ssh[-1]:
            command = f"sudo -n {command}"
        self.process = subprocess.Popen(
            tools.bound([*ssh, command]),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self.process.stdout
        wanted = ""
        with self.process.stdout as output:
            for raw in output:
                line = raw.decode(errors="replace").rstrip("\n")
                word, _, rest = line.partition(" ")
                if word == "@@ready":
                    self.ready.set()
                elif word == "@@for":
                    wanted = rest
                elif word == "@@at":
                    what, name = parse_marker(rest)
                    during, ended = (name if what == kind else "" for kind in ("begin", "end"))
                    self.events.put(Frozen(self, wanted, during, ended))
                elif word == "@@seen":
                    self.seen.append(base64.b64decode(rest))

    @property
    def lost(self) -> bool:
        return self.process.poll() is not None

    def go_on(self) -> None:
        """Thaw."""
        assert self.process.stdin
        with suppress(OSError):  # the machine is gone
            self.process.stdin.write(b"on\n")
            self.process.stdin.flush()

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        if self.process.stdin:
            with suppress(OSError):
                self.process.stdin.close()
