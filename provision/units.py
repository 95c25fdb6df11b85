"""Scripts that outlive the connection: a systemd unit whose log is followed by byte offset.

A unit's folder holds `script`, `unit` (what systemd starts), `log`, `id` (which start, which script) and, once
it has ended, `status`: its exit status, written under another name and renamed. For provisioning the folder is
/run/metal/UNIT and the unit a transient one, started here; runs.py has that of a training run, which outlives a
reboot, too. To go on following after a lost connection takes the offset only.
"""

import codecs
import hashlib
import re
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath

from provision.errors import ProvisionError

RUN = PurePosixPath("/run/metal")
UNIT = re.compile(r"[A-Za-z0-9:_.-]+")
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
POLL_S = 0.3  # how often the host looks whether the log has grown
BEATS = 10  # polls between two signs of life

OnLine = Callable[[str], None]


def unit_name(unit: str) -> str:
    """The name without `.service`, checked: it becomes a path and an argument."""
    name = unit.removesuffix(".service")
    if not UNIT.fullmatch(name):
        raise ValueError(f"not a unit name: {unit!r}")
    return name


def folder_of(unit: str) -> PurePosixPath:
    return RUN / unit_name(unit)


def variables(**values: str | PurePosixPath | int) -> str:
    """Shell assignments, quoted; the one place where values enter a script."""
    return "".join(f"{name}={shlex.quote(str(value))}\n" for name, value in values.items())


def script_id(script: str) -> str:
    return hashlib.sha256(script.encode()).hexdigest()


# A status is kept when the unit is stopped, too: a trapped TERM waits until the script has ended, which gets
# its own TERM from systemd. stdin is /dev/null, as no person is there to answer.
WRAPPER = r"""#!/bin/bash
export LC_ALL=C HOME="${HOME:-/root}"
trap : TERM
code=0
bash --norc --noprofile -euo pipefail "$1/script" >>"$1/log" 2>&1 </dev/null || code=$?
printf '%s\n' "$code" >"$1/.status"
sync "$1/.status" "$1/log"
mv -T "$1/.status" "$1/status"
exit "$code"
"""

# Whether a unit is: also where it is only about to be, or saves before its end.
AT_WORK = r"""
at_work() {  # UNIT, without .service
  case "$(systemctl is-active "$1.service" || true)" in active|activating|deactivating|reloading) ;; *) return 1;; esac
}
"""

# Idempotent by token: after a lost connection the same start is sent again and finds its own id.
# `reset-failed` frees the name of a unit that failed before. HOME is not set for units of root.
START = r"""
known=; if [ -r "$folder/id" ]; then known=$(cat "$folder/id"); fi
if [ "$known" = "$token $script" ]; then cat >/dev/null; echo started; exit; fi
if at_work "$unit"; then cat >/dev/null; [ "${known#* }" = "$script" ] && echo same || echo other; exit; fi
umask 077
install -d -m 711 "${folder%/*}"
mkdir -p "$folder"
rm -f "$folder/status" "$folder/id" "$folder/log"
cat >"$folder/script"
[ "$(sha256sum <"$folder/script")" = "$script  -" ] || { echo 'the script is cut short' >&2; exit 1; }
printf '%s' "$wrapper" >"$folder/unit"
: >>"$folder/log"
printf '%s\n' "$token $script" >"$folder/id"
[ -z "$user" ] || chown -R -- "$user:" "$folder"
systemctl reset-failed "$unit.service" 2>/dev/null || true
systemd-run --quiet --unit="$unit" --service-type=exec "${properties[@]}" \
    -- /bin/bash "$folder/unit" "$folder" </dev/null >&2 || { rm -f "$folder/id"; exit 1; }
echo started
"""


def start_script(
    unit: str,
    script: str,
    *,
    token: str,
    folder: PurePosixPath,
    user: str = "",
    properties: Sequence[str] = (),
) -> str:
    """What starts the unit and prints `started`; or `same`, `other`: so is the script that runs already.

    The unit's script comes on stdin; root runs this.
    """
    named = [f"User={user}"] if user else ["Environment=HOME=/root"]
    flags = " ".join(shlex.quote(f"--property={text}") for text in [*named, *properties])
    values = variables(
        unit=unit_name(unit),
        folder=folder,
        token=token,
        script=script_id(script),
        user=user,
        wrapper=WRAPPER,
    )
    return f"{values}properties=({flags})\n{AT_WORK}{START}"


# stdout carries the raw bytes of the log, stderr one word a line: beat, again (the log was replaced), end CODE,
# gone WHY. The beats also end this loop when the client is gone: it would wait on a quiet log for ever.
# The status is read before the size, so that all of the log has been sent when `end` is said.
FOLLOW = r"""
polls=0
while :; do
  code=
  read -r code 2>/dev/null <"$folder/status" || code=
  if [ -z "$code" ] && [ $((polls % beats)) = 0 ]; then
    echo beat >&2
    case "$(systemctl is-active "$unit.service" || true)" in
      inactive|failed|unknown)
        case "$(systemctl is-system-running 2>/dev/null || true)" in
          initializing|starting) ;;  # a boot has not come to it yet
          *) read -r code 2>/dev/null <"$folder/status" || code=gone;;
        esac;;
    esac
  fi
  size=$(stat -c %s -- "$log" 2>/dev/null || echo 0)
  if [ "$size" -lt "$offset" ]; then echo again >&2; offset=0; fi
  if [ "$size" -gt "$offset" ]; then
    piped=0
    tail -c "+$((offset + 1))" -- "$log" | head -c "$((size - offset))" || piped=$?
    case $piped in
      0|141) offset=$size;;  # 141: the log has grown beyond what head wanted
      *) [ ! -e "$log" ] || [ -r "$log" ] || exit 1;;  # else it was taken away just now
    esac
  fi
  if [ "$code" = gone ]; then
    why=$(systemctl show -p Result -p ExecMainCode -p ExecMainStatus "$unit.service" 2>/dev/null || true)
    echo gone $why >&2; exit
  fi
  if [ "$code" ]; then echo "end $code" >&2; exit; fi
  polls=$((polls + 1))
  sleep "$poll"
done
"""


def follow_script(unit: str, log: PurePosixPath, offset: int) -> str:
    return (
        variables(
            unit=unit_name(unit), folder=log.parent, log=log, offset=offset, beats=BEATS, poll=str(POLL_S)
        )
        + FOLLOW
    )


class Lines:
    """Bytes to lines. A character or a line that is cut in two by a chunk or a lost connection stays whole.

    They end on a person's terminal, so control characters become U+FFFD; of a line that was written over with
    carriage returns the last state counts.
    """

    def __init__(self, on_line: OnLine) -> None:
        self.on_line = on_line
        self.decode = codecs.getincrementaldecoder("utf-8")("replace").decode
        self.rest: list[str] = []

    def feed(self, data: bytes, *, final: bool = False) -> None:
        first, *others = self.decode(data, final).split("\n")
        self.rest.append(first)
        for text in others:
            self._line()
            self.rest = [text]
        if final and any(self.rest):
            self._line()

    def _line(self) -> None:
        line, self.rest = "".join(self.rest), []
        self.on_line(CONTROL.sub("\ufffd", line.rstrip("\r").rpartition("\r")[2]))


@dataclass
class Following:
    """What one follower knows: how far it is, and how the unit ended."""

    on_line: OnLine
    offset: int = 0
    code: int | None = None
    gone: str | None = None
    lines: Lines = field(init=False)
    words: Lines = field(init=False)

    def __post_init__(self) -> None:
        self.lines = Lines(self.on_line)
        self.reconnected()

    def reconnected(self) -> None:
        """What the connection before said on the side counts no more: part of the log may have been lost with it."""
        self.words = Lines(self.word)
        self.code = self.gone = None

    def log(self, data: bytes) -> None:
        self.offset += len(data)
        self.lines.feed(data)

    def control(self, data: bytes) -> None:
        self.words.feed(data)

    def word(self, line: str) -> None:
        match line.split(maxsplit=1):
            case ["end", code] if code.isdigit():
                self.code = int(code)
            case ["gone", *why]:
                self.gone = " ".join(why)
            case ["again"]:
                self.offset = 0

    def finish(self, unit: str, name: str) -> int:
        """The exit status, once the last line is out. Raises where the unit left none."""
        self.lines.feed(b"", final=True)
        if self.code is None:
            raise ProvisionError(
                f"{name}: {unit} ended without an exit status ({self.gone or 'nothing is known of it'}): "
                "it was killed, or the machine restarted.",
                f"On {name}: journalctl -u {unit_name(unit)}",
            )
        return self.code
