"""Step, the few kinds of it, and the Plan.

A Step is a probe (bash, read-only) whose output must equal `expect`, and a script (bash, idempotent) that
makes it so. Kinds such as `File` or `Packages` are functions that write such a pair. Probes and scripts are
the same for both systems: `$root` is `/mnt` on the live ISO and empty on the installed system, `at CMD…` runs a
command in that root, `in_target CMD…` one that also needs /proc, /sys and /dev there.

Everything here is pure: text in, text out. `provision.apply` talks to the host.
"""

import base64
import difflib
import hashlib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from shlex import join, quote

from provision.errors import ProvisionError
from provision.secrets import Secret

STATE = "/var/lib/metal-to-model"
BASE_COMPLETE = f"{STATE}/base-complete"  # last thing that the first installation writes: without it the root is unfinished
IN_DOUBT = f"{STATE}/packages-in-doubt"  # while pacman is at work, and until all that it wrote is on the disk
SECRETS = "/run/metal/secrets"  # in memory on both systems, for root only, and only while Steps are applied


@dataclass(frozen=True)
class Step:
    """One named change.

    `probe` prints what is there; the Step is done when that equals `expect`, blank ends of lines apart.
    `then` runs after the script, once for all Steps of a plan that name the same `then`, and again in a
    later run if it was cut off. `packages` is for the plan's reader and for merging; `disturbs_runs` where a
    training at work may fail by it. `secret` is what the script reads from the file `secret_file(secret)`; the
    probe must do without.
    """

    name: str
    why: str
    probe: str
    expect: str
    script: str
    then: str = ""
    packages: tuple[str, ...] = ()
    disturbs_runs: bool = False
    secret: Secret | None = None

    def is_done(self, observed: str) -> bool:
        return observed.rstrip() == self.expect.rstrip()


@dataclass(frozen=True)
class Planned:
    """A Step that is to be done, what the probe observed, and whether its `then` is owed from an earlier run."""

    step: Step
    observed: str
    owed: bool = False


@dataclass(frozen=True)
class Plan:
    """What is to be done, in order, and how many Steps were found done."""

    title: str
    pending: tuple[Planned, ...]
    done: int

    def __bool__(self) -> bool:
        return bool(self.pending)


def File(
    path: str, content: str, *, why: str, mode: int = 0o644, owner: str = "root:root", then: str = ""
) -> Step:
    """A regular file with this content, mode and owner (`user:group`); replaced by rename, never half written."""
    encoded = base64.b64encode(content.encode()).decode()
    write = (
        '[[ -d ${1%/*}/ ]] || mkdir -p -- "${1%/*}/";'
        ' umask 077; base64 -d > "$1.metal-new"; chown "$3" "$1.metal-new"; chmod "$2" "$1.metal-new";'
        ' mv -fT "$1.metal-new" "$1"'
    )
    return Step(
        name=f"file {path}",
        why=why,
        probe=f"at stat --format '%F, mode %a, %U:%G' -- {quote(path)}; at cat -- {quote(path)}",
        expect=f"regular {'' if content else 'empty '}file, mode {mode:o}, {owner}\n{content}",
        script=f"at bash -euc {quote(write)} file {quote(path)} {mode:o} {quote(owner)} <<< '{encoded}'",
        then=then,
    )


def Directory(path: str, *, why: str, mode: int = 0o755, owner: str = "root:root") -> Step:
    return Step(
        name=f"directory {path}",
        why=why,
        probe=f"at stat --format '%F, mode %a, %U:%G' -- {quote(path)}",
        expect=f"directory, mode {mode:o}, {owner}",
        script=f"at install -d -m {mode:o} -o {quote(owner.split(':')[0])} -g {quote(owner.split(':')[1])} -- {quote(path)}",
    )


def Link(path: str, target: str, *, why: str) -> Step:
    """A symbolic link; what stands in its place is replaced, unless it is a folder."""
    return Step(
        name=f"link {path}",
        why=why,
        probe=f"at readlink -- {quote(path)}",
        expect=target,
        script=f"at ln -sfnT -- {quote(target)} {quote(path)}",
    )


def Packages(*names: str, why: str) -> Step:
    """Packages of the configured repositories. `merge_packages` makes one transaction of all in a plan.

    Where the power went before it was all on the disk, files may be empty that pacman counts as installed, its own
    too: what it installed since is installed once more.
    """
    wanted = join(names)
    return Step(
        name=f"packages {' '.join(names)}",
        why=why,
        # --deptest prints those that nothing installed provides
        probe=f'[[ ! -e "$root"{IN_DOUBT} ]] || echo unfinished\npacman --root "${{root:-/}}" --deptest {wanted} || true',
        expect="",
        script=f"""groups=$({{ in_target pacman -Sg {wanted} 2> /dev/null || true; }} | cut -d' ' -f1 | sort -u | xargs)
[[ -z $groups ]] || {{ echo "not packages but groups of them, name those you want: $groups"; exit 1; }}
{transaction(wanted)}""",
        packages=names,
        disturbs_runs=True,
    )


def transaction(wanted: str, upgrade: str = "-Syu") -> str:
    """Bash: these packages (words of bash) in one transaction that also upgrades everything else."""
    # Never -Sy alone: a partial upgrade is unsupported on Arch (wiki, System maintenance).
    pacman = f"in_target pacman {upgrade} --noconfirm --noprogressbar"
    return f"""doubt="$root"{IN_DOUBT} pacman="$root"/var/lib/pacman again=
transaction() {{
  [[ -z $again ]] || {pacman} --overwrite '*' $again || return
  {pacman} --needed ${{again:+--overwrite '*'}} {wanted}
}}
if [[ -e $doubt ]]; then
  rm -f "$pacman/db.lck" "$pacman"/sync/*
  find "$pacman/local" -mindepth 2 -maxdepth 2 -name desc -size 0 -printf '%h\\0' | xargs --null --no-run-if-empty rm -r
  again=$(find "$pacman/local" -mindepth 1 -maxdepth 1 -type d -newer "$doubt" -printf '%f\\n' | sed 's/-[^-]*-[^-]*$//')
  # A download may be spoiled too: pacman deletes a whole one, and fails; of a begun one the mirror may have no rest.
  transaction || {{ rm -f "$root"/var/cache/pacman/pkg/*.part; transaction; }}
else
  mkdir -p "${{doubt%/*}}"
  touch "$doubt"
  sync
  # Who is killed by a signal leaves its lock behind, and what it had begun: the next time it is in doubt.
  transaction || {{ code=$?; sync; [[ $code -ge 128 ]] || rm "$doubt"; exit "$code"; }}
fi
sync
rm "$doubt"
"""


def Unit(name: str, *, why: str, start: bool = True) -> Step:
    """A systemd unit that is enabled and, on the installed system, running where `start` says so."""
    running = f"[[ $root ]] || systemctl is-active {quote(name)}" if start else "true"
    return Step(
        name=f"unit {name}",
        why=why,
        probe=f'systemctl --root="${{root:-/}}" is-enabled {quote(name)} || true\n'
        f"state=$({running}) || true\nprintf '%s\\n' \"${{state:-active}}\"",
        expect="enabled\nactive",
        script=f'systemctl --root="${{root:-/}}" enable {quote(name)}\n'
        + (
            f"if [[ ! $root ]]; then systemctl daemon-reload; systemctl start {quote(name)}; fi"
            if start
            else ""
        ),
    )


def User(name: str, *, shell: str, groups: Sequence[str], why: str) -> Step:
    """A person's account with a home, in at least these groups; no password is set, so that only keys log in.

    The home gets its place when all that is in it is on the disk, not as by `useradd --create-home`: after a power
    cut its files would be there, and empty.
    """
    wanted, quoted, home = " ".join(sorted({name, *groups})), quote(name), quote(f"/home/{name}")
    make = (
        'rm -rf "$1.metal-new"; mkdir -p "$1.metal-new"; [[ ! -d /etc/skel ]] || cp -rT /etc/skel "$1.metal-new";'
        ' chown -R "$2:" "$1.metal-new"; sync; mv -T "$1.metal-new" "$1"'
    )
    return Step(
        name=f"user {name}",
        why=why,
        probe=f"at getent passwd {quoted} | cut -d: -f7\n"
        f"comm -12 <(at id -nG {quoted} | tr ' ' '\\n' | sort) <(printf '%s\\n' {wanted}) | paste -sd ' '\n"
        f"at test -d {home} && echo home",
        expect=f"{shell}\n{wanted}\nhome",
        # '*' as the password: nothing matches it, yet sshd does not take the account for a locked one as it does with '!'
        script=f"at test -x {quote(shell)} || {{ echo {quote(f'there is no {shell}: put its package into system.packages')}; exit 1; }}\n"
        f"at id -u {quoted} > /dev/null 2>&1 || at useradd --no-create-home --user-group --password '*' {quoted}\n"
        f"at usermod --shell {quote(shell)} --append --groups {quote(','.join(groups))} {quoted}\n"
        f"at test -d {home} || at bash -euc {quote(make)} home {home} {quoted}",
    )


def Password(user: str, secret: Secret, *, why: str) -> Step:
    """An account's password. Only its hash reaches the host's disk.

    Beside it stands a digest of that hash and of the reference. So the probe needs no secret to see that either was
    changed; what it cannot see is another secret behind the same reference.
    """
    quoted, record = quote(user), f"{STATE}/password/{user}"
    digest = f"{{ echo {digest_of(secret)}; at getent shadow {quoted} | cut -d: -f2; }} | sha256sum"
    return Step(
        name=f"password of {user}",
        why=why,
        probe=f'[[ $({digest}) == "$(at cat {quote(record)})" ]] && echo yes',
        expect="yes",
        script=f"umask 077\nhash=$(openssl passwd -6 -stdin < {secret_file(secret)})\n"
        f"printf '%s:%s\\n' {quoted} \"$hash\" | at chpasswd --encrypted\n"
        f'mkdir -p "$root"{STATE}/password\n{digest} > "$root"{quote(record)}',
        secret=secret,
    )


def digest_of(secret: Secret) -> str:
    """A name for a reference that tells nothing to who does not know it."""
    return hashlib.sha256(secret.reference.encode()).hexdigest()[:16]


def secret_file(secret: Secret) -> str:
    """Where a Step's script finds its secret: one line."""
    return f"{SECRETS}/{digest_of(secret)}"


def Script(
    name: str,
    *,
    why: str,
    probe: str,
    script: str,
    expect: str = "yes",
    then: str = "",
    secret: Secret | None = None,
) -> Step:
    """Anything else: `probe` prints `expect` when it is done."""
    return Step(name=name, why=why, probe=probe, expect=expect, script=script, then=then, secret=secret)


def merge_packages(steps: Iterable[Step]) -> list[Step]:
    """One Packages Step, at the place of the first, for all of them: one transaction keeps kernel and driver in step."""
    listed = list(steps)
    wanting = [step for step in listed if step.packages]
    if not wanting:
        return listed
    names = tuple(dict.fromkeys(name for step in wanting for name in step.packages))
    why = "; ".join(dict.fromkeys(f"{' '.join(step.packages)}: {step.why}" for step in wanting))
    merged = replace(Packages(*names, why=why), name=f"{len(names)} packages")
    return [
        merged if step is wanting[0] else step for step in listed if step is wanting[0] or not step.packages
    ]


def check_unique(steps: Sequence[Step]) -> None:
    """Two Steps of one name would undo each other for ever."""
    seen: set[str] = set()
    for step in steps:
        if step.name in seen:
            raise ProvisionError(
                f"Two Steps are called '{step.name}'.",
                "A concern in provision/system yields it twice, or the machine file asks for what the system makes anyway.",
            )
        seen.add(step.name)


# --- bash -------------------------------------------------------------------------------------------------


def flag(then: str) -> str:
    """Where a host remembers that this `then` is owed: set before the Step's script, removed after `then`."""
    return f"{STATE}/then/{hashlib.sha256(then.encode()).hexdigest()[:16]}"


def prelude(root: str) -> str:
    """What every probe and script finds defined. C.UTF-8 and not C: pacman reads packages with such file names."""
    return f"""root={root}
at() {{ if [[ $root ]]; then chroot "$root" "$@"; else "$@"; fi; }}
in_target() {{ if [[ $root ]]; then arch-chroot "$root" "$@"; else "$@"; fi; }}
export LC_ALL=C.UTF-8
"""


def render_probes(steps: Sequence[Step], root: str, mounts: Sequence[tuple[str, str, str]] = ()) -> str:
    """One script that runs all probes; `parse_probes` reads its output.

    `mounts` (device, folder, options) are made read-only in a mount namespace of the script's own where the
    first of them is not mounted yet, so that a probe sees a half-installed disk and changes nothing.
    What a probe prints is sent as it is, between lines that begin with a mark which no file can hold: a process
    less a Step than an encoding would cost.
    """
    lines = [prelude(root), "mounted=yes", "read -r mark < /proc/sys/kernel/random/uuid", 'echo "$mark"']
    if mounts:
        lines.append(f"if ! mountpoint -q {quote(mounts[0][1])}; then\n  mounted=no")
        for device, folder, options in mounts:
            lines.append(f"  [[ -b {device} ]] && mount -o {options} {device} {quote(folder)} 2>/dev/null")
        lines.append("fi")
    for index, step in enumerate(steps):
        owed = f'[[ -e "$root"{flag(step.then)} ]]' if step.then else "false"
        lines.append(f'if {owed}; then echo "$mark {index} owed"; else echo "$mark {index} clear"; fi')
        lines.append(f"(\n{step.probe}\n) < /dev/null 2> /dev/null; echo")
    body = "\n".join([*lines, 'echo "$mark end"'])
    if not mounts:
        return f"set +eo pipefail\n{body}\n"
    inner = f"bash --norc --noprofile <(printf '%s' {quote(body)})"
    return f"unshare --mount --propagation private {inner}\n"


def parse_probes(steps: Sequence[Step], text: str) -> list[tuple[str, bool]]:
    """Per Step (what its probe printed, whether its `then` is owed)."""
    mark, _, answers = text.partition("\n")
    before, *frames = answers.split(f"{mark} ") if mark else [""]
    if before or len(frames) != len(steps) + 1 or frames[-1] != "end\n":
        raise ProvisionError("The answer of the Steps' probes is incomplete.", "Run the command again.")
    results = []
    for index, frame in enumerate(frames[:-1]):
        head, _, observed = frame.partition("\n")
        if head not in (f"{index} owed", f"{index} clear"):
            raise ProvisionError(f"The probes answered out of order: {head!r} in place of {index}.")
        results.append((observed.removesuffix("\n"), head.endswith("owed")))
    return results


def make_plan(title: str, steps: Sequence[Step], observations: Sequence[tuple[str, bool]]) -> Plan:
    pending = tuple(
        Planned(step, observed, owed)
        for step, (observed, owed) in zip(steps, observations, strict=True)
        if owed or not step.is_done(observed)
    )
    return Plan(title, pending, len(steps) - len(pending))


def render_apply(plan: Plan, root: str) -> str:
    """One script for all pending Steps. It prints `@@begin N NAME`, `@@end N` and `@@failed N CODE` around their output."""
    last = {planned.step.then: index for index, planned in enumerate(plan.pending) if planned.step.then}
    # A subshell and not a bash of its own for each Step; and not as a condition, in which bash ignores `set -e`.
    lines = [
        prelude(root),
        "run_step() {",
        '  printf "@@begin %s %s\\n" "$1" "$2"',
        f'  set +e\n  (set -euo pipefail\n{FAILED_COMMAND}eval "$3") < /dev/null 2>&1\n  code=$?\n  set -e',
        '  if ((code == 0)); then [[ -z ${4-} ]] || settled+=("$root$4"); printf "\\n@@end %s\\n" "$1"; return; fi',
        FULL,
        '  printf "\\n@@failed %s %s\\n" "$1" "$code"; exit "$code"',
        "}",
    ]
    # What a `then` made is owed until it is on the disk. One sync for all of them, at the end.
    lines += ["settled=()", """settle() { ((${#settled[@]} == 0)) || { sync; rm "${settled[@]}"; }; }"""]
    secrets = any(planned.step.secret for planned in plan.pending)
    lines.append(f"trap 'settle{f'; rm -rf {SECRETS}' if secrets else ''}' EXIT")
    for index, planned in enumerate(plan.pending):
        step = planned.step
        parts, settled = [step.script], ""
        if step.then:
            owed = flag(step.then)
            parts.insert(0, f'mkdir -p "$root"{STATE}/then; touch "$root"{owed}')
            if last[step.then] == index:
                parts.append(step.then)
                settled = f" {owed}"
        lines.append(f"run_step {index} {quote(step.name)} {quote(chr(10).join(parts))}{settled}")
    return "\n".join(lines) + "\n"


# Said after whatever failed: programs seldom name the file system, and some not even the reason.
FULL = """\
  df --block-size=1M --output=avail,target "${root:-/}" "$root/boot" / 2> /dev/null | sort -u | while read -r left place; do
    if [[ $left != Avail ]] && ((left < 16)); then echo "$place is full: $left MiB are left there; make room on it"; fi
  done || true"""
FAILED_COMMAND = """trap 'printf "%s\\n" "command failed with exit $?: $BASH_COMMAND" >&2' ERR\nset -E\n"""


# --- text for a person --------------------------------------------------------------------------------------

# What a file on the host holds ends on a person's terminal.
CONTROL, REPLACED = re.compile(r"[\x00-\x08\x0a-\x1f\x7f-\x9f]"), "\ufffd"


def render_plan(plan: Plan, *, diffs: bool = True) -> str:
    """The plan as text: every Step and its reason; with `diffs`, how what is there differs from what is wanted."""
    if not plan:
        return f"{plan.title}: nothing to do, {plan.done} Steps are as they should be."
    lines = [f"{plan.title}: {len(plan.pending)} Steps to do, {plan.done} done"]
    for number, planned in enumerate(plan.pending, 1):
        first, *more = planned.step.why.split("; ")
        lines.append(f"{number:3}. {planned.step.name}: {first}")
        lines.extend(f"     {part}" for part in more)
        if diffs:
            lines.extend(f"       {CONTROL.sub(REPLACED, line)}" for line in difference(planned))
            lines.extend(f"       then {then}" for then in brief(planned.step.then))
    return "\n".join(lines)


def brief(then: str) -> list[str]:
    """What runs after a Step, where a person would read it in the plan: one command, not a whole script."""
    command = then.removeprefix("in_target ").removeprefix("[[ $root ]] || ")
    return [command] if command and "\n" not in command and len(command) <= 80 else []


def difference(planned: Planned) -> list[str]:
    """Lines: `-` as it is there, `+` as it is wanted, blank what is the same beside them."""
    step, observed = planned.step, planned.observed.rstrip("\n")
    if step.packages:
        missing = [name for name in observed.split() if name in step.packages]
        also = [] if "unfinished" in observed else ["and everything else is upgraded: pacman -Syu"]
        return [f"missing: {' '.join(missing)}", *also] if missing else []
    if step.is_done(planned.observed):
        return [f"interrupted before: {step.then}"]
    if "\n" not in step.expect.rstrip() and "\n" not in observed:
        return [f"- {observed}", f"+ {step.expect}"] if observed else []
    diff = difflib.unified_diff(observed.splitlines(), step.expect.splitlines(), lineterm="", n=1)
    return [line for line in diff if not line.startswith(("---", "+++", "@@"))]
