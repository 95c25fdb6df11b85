"""More kinds of Step, for what a person adds: checked files, single lines, states of units, groups of packages.

Pure, and in the same words as `provision.steps`: `$root`, `at`, `in_target`.
"""

import base64
from collections.abc import Mapping, Sequence
from dataclasses import replace
from shlex import join, quote

from provision.steps import File, Step, transaction


def Groups(*names: str, why: str) -> Step:
    """Groups of packages: all that is in them by the package lists of the last upgrade, and whatever comes later."""
    wanted = join(names)
    return Step(
        name=f"package groups {' '.join(names)}",
        why=why,
        probe=f"""for group in {wanted}; do
  members=$(pacman --root "${{root:-/}}" -Sgq "$group")
  [[ $members ]] || echo "$group is not known"
  [[ -z $members ]] || pacman --root "${{root:-/}}" --deptest $members
done""",
        expect="",
        script=f"""for group in {wanted}; do
  in_target pacman -Sgq "$group" > /dev/null || {{ echo "no group of packages is called $group"; exit 1; }}
done
members=$(in_target pacman -Sgq {wanted} | sort -u | xargs)
{transaction("$members")}""",
        disturbs_runs=True,
    )


# What must hold of a file that could lock its owner out, before it gets its place: a script of bash by where it lies. It
# finds the new content in $1, the path in $2 and the machine's user in $3.
SUDOERS = 'visudo --check --quiet --file="$1"'
SSHD = r"""
mkdir -p /run/sshd
tried=$(mktemp --directory)
trap 'rm -rf "$tried"' EXIT
cp /etc/ssh/sshd_config "$tried"
mkdir "$tried/sshd_config.d"
cp /etc/ssh/sshd_config.d/*.conf "$tried/sshd_config.d" 2> /dev/null || true
cp "$1" "$tried/${2#/etc/ssh/}"
sed -i "s,/etc/ssh/sshd_config.d/,$tried/sshd_config.d/,g" "$tried/sshd_config"
/usr/sbin/sshd -t -f "$tried/sshd_config"
said=$(/usr/sbin/sshd -T -f "$tried/sshd_config" -C "user=$3,host=localhost,addr=127.0.0.1")
has() { grep -qixE "$1" <<< "$said"; }
refuse() { echo "with it $1"; exit 1; }
ssh-keygen -l -f "$(getent passwd "$3" | cut -d: -f6)/.ssh/authorized_keys" > /dev/null || refuse "$3 has no keys to log in with"
has 'pubkeyauthentication yes' || refuse "sshd takes no public keys"
has '(authenticationmethods (any|publickey))' || refuse "a key alone does not log in"
has 'authorizedkeysfile (.* )?\.ssh/authorized_keys( .*)?' || refuse "sshd does not read ~/.ssh/authorized_keys"
has "allowusers $3" || ! has 'allowusers .*' || refuse "$3 may not log in"
! has "denyusers $3" || refuse "$3 may not log in"
! has '(allow|deny)groups .*' || refuse "groups decide who logs in, which is not checked here; name users instead"
"""
NFT = 'nft --check --file "$1"'
CHECKS = {
    "/etc/sudoers": SUDOERS,
    "/etc/sudoers.d/": SUDOERS,
    "/etc/ssh/sshd_config": SSHD,
    "/etc/ssh/sshd_config.d/": SSHD,
    "/etc/nftables.conf": NFT,
}


def check_for(path: str) -> str:
    """The check that a file there must pass; "" where there is none."""
    return CHECKS.get(path) or CHECKS.get(path[: path.rfind("/") + 1], "")


def CheckedFile(
    path: str,
    content: str,
    *,
    why: str,
    check: str,
    user: str,
    mode: int = 0o644,
    owner: str = "root:root",
    then: str = "",
) -> Step:
    """A File that gets its place only when `check` (see CHECKS) is content with it; else the old one stays, and the Step fails."""
    plain = File(path, content, why=why, mode=mode, owner=owner, then=then)
    encoded = base64.b64encode(content.encode()).decode()
    staged = quote(f"{path}.metal-new")
    write = '[[ -d ${1%/*}/ ]] || mkdir -p -- "${1%/*}/"; umask 077; base64 -d > "$1"; chown "$3" "$1"; chmod "$2" "$1"'
    return replace(
        plain,
        script=f"at bash -euc {quote(write)} file {staged} {mode:o} {quote(owner)} <<< '{encoded}'\n"
        f"in_target bash -euo pipefail -c {quote(check)} check {staged} {quote(path)} {quote(user)} || {{\n"
        f"  at rm -f {staged}\n  echo {quote(f'refused: {path} stays as it was')}\n  exit 1\n}}\n"
        f"at mv -fT {staged} {quote(path)}",
    )


# Reads the file $1; the lines that match $2 (an ERE; "" means: equal $3) are printed.
MATCHING = r"""
matches() { if [[ $pattern ]]; then [[ $1 =~ $pattern ]]; else [[ $1 == "$wanted" ]]; fi; }
file=$1 pattern=$2 wanted=$3 lines=()
[[ ! -e $file ]] || mapfile -t lines < "$file"
"""
PRINT_LINES = (
    MATCHING
    + 'echo "lines that match:"; for line in "${lines[@]}"; do if matches "$line"; then printf "%s\\n" "$line"; fi; done'
)
# The first line that matches becomes the wanted one, others go; owner and mode stay.
SET_LINE = (
    MATCHING
    + r"""
kept=() found=
for line in "${lines[@]}"; do
  if ! matches "$line"; then kept+=("$line")
  elif [[ $wanted && ! $found ]]; then kept+=("$wanted"); found=yes; fi
done
[[ ! $wanted || $found ]] || kept+=("$wanted")
new=$file.metal-new
rm -f "$new"
if [[ -e $file ]]; then cp --attributes-only --preserve=all "$file" "$new"; else
  mkdir -p "${file%/*}/"
  install -m 644 /dev/null "$new"
fi
((${#kept[@]} == 0)) || printf '%s\n' "${kept[@]}" > "$new"
mv -fT "$new" "$file"
"""
)


def Line(file: str, line: str, match: str, *, name: str, why: str, then: str = "") -> Step:
    """Of a file's lines that match, this one and no other; `line` "" for none at all."""
    words = join([file, match, line])
    return Step(
        name=f"line {name} of {file}",
        why=why,
        probe=f"at bash -c {quote(PRINT_LINES)} line {words}",
        expect=f"lines that match:\n{line}",
        script=f"at bash -euc {quote(SET_LINE)} line {words}",
        then=then,
    )


# What `systemctl is-enabled` and `is-active` say of the unit $unit, in the words of UnitState: two lines.
ENABLED_STATE = r"""
systemctl --root="${root:-/}" is-enabled "$unit" || true
if [[ $root ]]; then echo active; exit; fi
state=$(systemctl is-active "$unit") || true
if [[ $state == inactive && $(systemctl show --property Type --value "$unit") == oneshot ]]; then state=active; fi
echo "$state"
"""
OFF_STATE = r"""
state=$(systemctl --root="${root:-/}" is-enabled "$unit") || true
case $state in enabled*|linked*|masked*) echo "$state" ;; *) echo disabled ;; esac
if [[ $root ]]; then echo inactive; exit; fi
state=$(systemctl is-active "$unit") || true
case $state in failed|unknown) echo inactive ;; *) echo "$state" ;; esac
"""
# systemctl with --root writes the links and tells a running systemd nothing: what it knows as masked stays masked to it.
ENABLE = r"""
systemctl --root="${root:-/}" unmask "$unit"
if [[ ! $root ]]; then
  systemctl daemon-reload
  systemctl cat "$unit" > /dev/null 2>&1 || { echo "there is no unit $unit: put its package into system.packages"; exit 1; }
fi
systemctl --root="${root:-/}" enable "$unit"
state=$(systemctl --root="${root:-/}" is-enabled "$unit") || true
[[ $state == enabled ]] || { echo "$unit is $state, and cannot be enabled: another unit starts it, or must name it"; exit 1; }
[[ $root ]] || systemctl start "$unit"
"""
DISABLE = r"""
systemctl --root="${root:-/}" unmask "$unit"
systemctl --root="${root:-/}" disable "$unit"
[[ $root ]] || { systemctl daemon-reload; systemctl stop "$unit"; }
"""
MASK = r"""
systemctl --root="${root:-/}" mask "$unit"
[[ $root ]] || { systemctl daemon-reload; systemctl stop "$unit" 2> /dev/null || true; }
"""


def UnitState(name: str, state: str, *, why: str) -> Step:
    """A unit enabled, disabled or masked, and on the installed system running or not. A oneshot need not run on."""
    running = "active" if state == "enabled" else "inactive"
    script = {"enabled": ENABLE, "disabled": DISABLE, "masked": MASK}[state]
    return Step(
        name=f"unit {name}",
        why=why,
        probe=f"unit={quote(name)}{ENABLED_STATE if state == 'enabled' else OFF_STATE}",
        expect=f"{state}\n{running}",
        script=f"unit={quote(name)}{script}",
    )


def Sysctl(settings: Mapping[str, str], *, why: str) -> Step:
    """Kernel settings as they are now; the file that sets them at boot is another Step."""
    words = {key: " ".join(value.split()) for key, value in settings.items()}
    return Step(
        name="kernel settings",
        why=why,
        probe=f"sysctl {join(words)} | tr -s '\\t ' ' '",
        expect="".join(f"{key} = {value}\n" for key, value in words.items()),
        script="\n".join(f"sysctl --write {quote(f'{key}={value}')}" for key, value in words.items()),
    )


def ParentFolders(folders: Sequence[str], owner: str, *, name: str, why: str) -> Step:
    """Folders that must exist, made for `owner`; one that is there stays as it is."""
    wanted = join(folders)
    user, group = owner.split(":")
    return Step(
        name=f"folders above {name}",
        why=why,
        probe=f'for folder in {wanted}; do at test -d "$folder" || echo "$folder"; done',
        expect="",
        script=f'for folder in {wanted}; do\n  at test -d "$folder" || at install -d -o {quote(user)} -g {quote(group)} -- "$folder"\ndone',
    )
