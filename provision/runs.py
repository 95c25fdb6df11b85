"""What a run is on its host: folder, systemd unit, and what becomes of it when it crashes or the machine restarts.

    metal/runs/ID/          what the workload writes, and
      script                what the unit does: prepares data where it is wanted, then trains
      unit                  WRAPPER below: runs it, and decides whether it is to be started again
      id                    which start this is: "TOKEN SCRIPT-HASH"
      hosts                 of a run over several machines their names; the first has checkpoints, metrics and the log
      node                  of such a run this machine's place in it, see meet.py
      reached               on its other machines: the newest checkpoint that the first one has
      log                   all that was printed, by all its starts
      tries                 "N CHECKPOINT": starts since that checkpoint was the newest
      reserve               room for the last words where the disk is full
      stop                  a person wants it to end
      status                its exit status: the run has ended. Written last, renamed; a unit with it does not start
    /etc/systemd/system/metal-run-ID.service    enabled until the run has ended, so a reboot goes on with it

The unit belongs to the system's manager and runs as the user: nobody needs to be logged in.
"""

import re
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import PurePosixPath
from shlex import join, quote

from provision.errors import ProvisionError
from provision.host import Host
from provision.system.python import ENVIRONMENT
from provision.units import AT_WORK, script_id, variables
from workload.launch import ELSEWHERE

RUN_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,100}")
PLAIN_PATH = re.compile(r"(/[A-Za-z0-9_.@-]+)+")  # what needs no quoting in a unit file
TRIES = 5  # starts without a new checkpoint between them: then the run has failed
RESTART_S = 10  # between a crash and the next start
GAVE_UP = 200  # exit status of a unit that is not to be started again

# Not restarted: what ended well, what a person stopped, and a run whose first start failed by itself before its
# first step, for it would fail again. The signal goes to the whole control group, so the trainer has it too; bash
# waits for it before it takes its own. A machine that goes down stops its units as well: such a run has not ended,
# and where the manager gives no answer any more, it is going down. Of a run over several machines all trainers end
# when one does; those that were not meant are started again and wait for it.
WRAPPER = r"""#!/bin/bash
export LC_ALL=C
cd "$1" || exit
asked= code=0 tries=0 since= newest=none
trap 'asked=yes' TERM
[ -e reserve ] || head -c 65536 /dev/zero >reserve 2>/dev/null
full() {
  local left=yes
  head -c 4096 /dev/zero 2>/dev/null >.room || left=
  rm -f .room
  [ ! "$left" ]
}
say() { printf 'metal: %s\n' "$*" >>log; }
finish() {
  printf '%s\n' "$1" >.status
  sync .status log
  mv -T .status status
}
if [ -e stop ]; then  # it was killed while it saved
  finish 137
  exit
fi
for manifest in checkpoints/step-*/manifest.json; do
  [ ! -e "$manifest" ] || { newest=${manifest%/*}; newest=${newest##*/}; }
done
[ "$newest" != none ] || read -r newest 2>/dev/null <reached
read -r tries since 2>/dev/null <tries
[ "$since" = "$newest" ] || tries=0
tries=$((tries + 1))
printf '%s %s\n' "$tries" "$newest" >.tries && mv -T .tries tries
if [ "$tries" -gt "$most" ]; then
  say "ended without a word $most times since checkpoint $newest; not started again"
  finish 137
  exit "$gave_up"
fi
[ "$tries" = 1 ] || say "start $tries of $most since checkpoint $newest"
bash --norc --noprofile -euo pipefail script >>log 2>&1 </dev/null || code=$?
why="ended with status $code"
[ "$code" != "$elsewhere" ] || why='another machine of this run was lost or stopped'
if [ "$asked" ] || { [ "$code" = "$elsewhere" ] && [ -e stop ]; }; then
  if [ ! -e stop ]; then
    case "$(systemctl is-system-running 2>/dev/null)" in
      running|degraded|starting|initializing|maintenance) ;;
      *) say 'the machine goes down; the run goes on after its boot'; exit "$code";;
    esac
  fi
  case $code in 143|"$elsewhere") code=0;; esac
  finish "$code"
elif [ "$code" = 0 ]; then
  finish 0
elif full; then
  rm -f reserve
  say "$why: the disk is full; not started again. Make room, then resume it"
  finish "$code"
  code=$gave_up
elif [ "$newest" = none ] && [ "$code" -lt 128 ] && [ "$code" != "$elsewhere" ] &&
    [ ! -s metrics.jsonl ] && [ ! -s reached ]; then
  finish "$code"
  code=$gave_up
elif [ "$tries" -ge "$most" ]; then
  say "$why, for the ${tries}th time since checkpoint $newest; not started again"
  finish "$code"
  code=$gave_up
else
  say "$why; starting again in $pause s"
fi
exit "$code"
"""

# StartLimit is the net below the wrapper's own count, for a disk so full that it cannot count.
SERVICE = """\
# A training run of metal-to-model; `fab -H NAME remove --run {run}` takes it away.
[Unit]
Description=training run {run}
ConditionPathExists=!{folder}/status
RequiresMountsFor={folder}
After=network.target dbus.service nvidia-persistenced.service
StartLimitIntervalSec=1800
StartLimitBurst=10

[Service]
Type=exec
User={user}
ExecStart=/bin/bash {folder}/unit {folder}
ExecStopPost=+/bin/bash -c '[ ! -e {folder}/status ] || systemctl --no-reload --quiet disable {unit}.service'
Restart=on-failure
RestartSec={pause}
RestartPreventExitStatus={gave_up}
KillSignal=SIGTERM
TimeoutStopSec=600
OOMPolicy=continue

[Install]
WantedBy=multi-user.target
"""

# Idempotent by token: after a lost connection the same start is sent again and finds its own id. Without a script
# on stdin (`script` is empty) the run's own is started again.
START = r"""
umask 077
mkdir -p "$folder"
cd "$folder"
exec 9>.lock
flock 9
known=; if [ -r id ]; then known=$(cat id); fi
if [ "${known%% *}" = "$token" ]; then cat >/dev/null; echo started; exit; fi
if at_work "$unit"; then cat >/dev/null; echo running; exit; fi
if [ "$script" ]; then
  cat >.script
  [ "$(sha256sum <.script)" = "$script  -" ] || { echo 'the script is cut short' >&2; exit 1; }
  mv -T .script script
else
  [ -r script ] || { echo missing; exit; }
fi
printf '%s' "$wrapper" >unit
if [ "$node" ]; then
  printf '%s' "$node" >node
  printf '%s\n' "$hosts" >hosts
elif [ "$script" ]; then
  rm -f node hosts
fi
: >>log
rm -f status stop tries
printf '%s\n' "$token" >id
sync .
sudo -n bash -euc '
  umask 022
  file=/etc/systemd/system/$1.service
  printf "%s" "$2" >"$file.new"
  sync "$file.new"
  mv -T "$file.new" "$file"
  systemctl daemon-reload
  systemctl reset-failed "$1.service" 2>/dev/null || true
  systemctl --quiet enable "$1.service"
  systemctl start "$1.service"
' _ "$unit" "$service" </dev/null >&2 9>&- || { rm -f id; sudo -n systemctl --quiet disable "$unit.service" || true; exit 1; }
echo started
"""

STOP = r"""
cd "$folder" 2>/dev/null && [ -e id ] || { echo missing; exit; }
if [ -e status ]; then echo ended; exit; fi
: >stop
case "$(systemctl show -p SubState "$unit.service")" in *=running|*=stop-*) ;; *) now=yes;; esac  # nothing to save
if [ "$now" ]; then
  echo 137 >.stopped  # first: with a status it is not started again. Not by the name that the unit itself writes
  sync .stopped
  mv -T .stopped status
  sudo -n bash -c '
    systemctl kill --signal=KILL "$1.service"
    systemctl stop "$1.service"
    systemctl --quiet disable "$1.service"
  ' _ "$unit" </dev/null >&2 || true
  echo ended-now
else
  sudo -n systemctl --no-block stop "$unit.service"
  echo stopping
fi
"""

# Only what is not at work; renamed first, so that a half-removed run is not taken for one.
REMOVE = r"""
cd "${folder%/*}" 2>/dev/null || { echo missing; exit; }
rm -rf ".${folder##*/}.removed"  # what an earlier call was cut off at
[ -d "$folder" ] || { echo missing; exit; }
if at_work "$unit"; then echo running; exit; fi
sudo -n bash -euc '
  if [ -e "/etc/systemd/system/$1.service" ]; then
    systemctl --quiet disable "$1.service" || true
    rm -f "/etc/systemd/system/$1.service"
    systemctl daemon-reload
  fi
  systemctl reset-failed "$1.service" 2>/dev/null || true
' _ "$unit" </dev/null >&2
size=$(du -sb "$folder" | cut -f 1)
mv -T "$folder" ".${folder##*/}.removed"
rm -rf ".${folder##*/}.removed"
echo "removed $size"
"""


@dataclass(frozen=True)
class Folder:
    """`machine.train.folder` below the user's home, absolute."""

    path: PurePosixPath

    @property
    def runs(self) -> PurePosixPath:
        return self.path / "runs"

    def run(self, run: str) -> PurePosixPath:
        return self.runs / checked_run(run)

    def source(self, source: str) -> PurePosixPath:
        return self.path / "source" / source

    def data(self, key: str) -> PurePosixPath:
        return self.path / "data" / key


def checked_run(run: str) -> str:
    if not RUN_ID.fullmatch(run):
        raise ProvisionError(f"'{run}' is not the id of a run; expected letters, digits, '.', '_' and '-'.")
    return run


def unit_of(run: str) -> str:
    return f"metal-run-{run}"


def new_run_id(name: str, now: datetime) -> str:
    """Sorts by time, and says what it is."""
    return f"{now.astimezone(UTC):%Y%m%d-%H%M%S}-{name}"


def train_script(
    folder: Folder,
    source: str,
    run: str,
    arguments: Sequence[str],
    prepare: Sequence[str] = (),
    hosts: Sequence[str] = (),
) -> str:
    """What the unit runs. `prepare`: arguments of `workload prepare`, whose last is the folder to make.

    `hosts`: of a run over several machines their names. The script is the same on all; `node` beside it differs.

    `exec`, so that the signal that stops the unit reaches Python itself. Python by its real path: a new environment
    may take the link's place while the run still imports.
    """
    out = folder.run(run)
    lines = [
        f"cd {quote(str(out))}",
        f"export PYTHONPATH={quote(str(folder.source(source)))} PYTHONUNBUFFERED=1",
        f'python="$(readlink -f {ENVIRONMENT})"/bin/python',
    ]
    if prepare:
        made = quote(prepare[-1])
        lines += [
            f"if [ ! -e {made} ]; then",
            f"  mkdir -p {quote(str(PurePosixPath(prepare[-1]).parent))}",
            f'  "$python" {join(["-m", "workload", "prepare", *prepare])}',
            "fi",
        ]
    train = join(["-m", "workload", "train", "--out", str(out), *arguments])
    if hosts:
        lines.append(f". ./node  # of {' '.join(hosts)}")
        train += ' --nnodes "$nodes" --node-rank "$rank" --rendezvous "$meet"'
    lines.append(f'exec "$python" {train}')
    return "\n".join(lines) + "\n"


def render_service(run: str, folder: PurePosixPath, user: str) -> str:
    """The unit file. Raises ProvisionError where the folder's path would need quoting in it."""
    if not PLAIN_PATH.fullmatch(str(folder)):
        raise ProvisionError(
            f"The run's folder {folder} holds a character that a unit file gives a meaning to.",
            "The user's home must be a plain path of letters, digits, '.', '_' and '-'.",
        )
    return SERVICE.format(
        run=run, unit=unit_of(run), folder=folder, user=user, pause=RESTART_S, gave_up=GAVE_UP
    )


def start_run(
    host: Host,
    folder: Folder,
    run: str,
    user: str,
    script: str = "",
    *,
    node: str = "",
    hosts: Sequence[str] = (),
) -> str:
    """`started`; `running` where it is at work already; `missing` where there is no such run and no script.

    `node`, `hosts`: of a run over several machines this one's place, and their names.
    """
    path = folder.run(run)
    values = variables(
        folder=path,
        unit=unit_of(run),
        token=secrets.token_hex(8),
        script=script_id(script) if script else "",
        wrapper=render_wrapper(),
        service=render_service(run, path, user),
        node=node,
        hosts=" ".join(hosts),
    )
    return host.run_again(values + AT_WORK + START, stdin=script.encode(), as_root=False).stdout.strip()


def render_wrapper() -> str:
    first, rest = WRAPPER.split("\n", 1)
    values = variables(most=TRIES, pause=RESTART_S, gave_up=GAVE_UP, elsewhere=ELSEWHERE)
    return f"{first}\n{values}{rest}"


def mark_stopped(host: Host, folder: Folder, run: str) -> None:
    """A person wants the run to end: when its trainer does, its unit does not start it again."""
    script = '[ ! -e "$folder/id" ] || [ -e "$folder/status" ] || : >"$folder/stop"'
    host.run(variables(folder=folder.run(run)) + script, as_root=False)


def stop_run(host: Host, folder: Folder, run: str, *, now: bool) -> str:
    """`stopping`; `ended` where it had already; `missing`. `now`: killed, so without a checkpoint; `ended-now`."""
    values = variables(folder=folder.run(run), unit=unit_of(run), now="yes" if now else "")
    return host.run(values + STOP, as_root=False, deadline_s=120).stdout.strip()


def remove_run(host: Host, folder: Folder, run: str) -> str:
    """`removed BYTES`, `running` or `missing`."""
    values = variables(folder=folder.run(run), unit=unit_of(run))
    return host.run(values + AT_WORK + REMOVE, as_root=False, deadline_s=600).stdout.strip()
