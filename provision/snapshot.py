"""The system as it was before an update: a btrfs snapshot, its kernels on the ESP, an entry that boots the two. Pure.

The ESP is in no snapshot, and a kernel without its modules finds no network. So at every moment the entry that boots
by default names a root and kernels that belong together, wherever the power is cut:

    update    the snapshot is made, its kernels are copied, its entry is written; only then it is what boots, until all
              packages are in and the ESP's kernels are those of the modules. Then the updated system is what boots.
    rollback  the snapshot is what boots; it takes the place of @; its kernels take theirs; then @ is what boots.

The entry names the snapshot by its number, which stays when the snapshot is renamed. So whatever was cut off is begun
again by the same command, from what it finds.
"""

from shlex import join, quote

from provision.machine import Machine
from provision.steps import STATE, Script, Step, transaction
from provision.system.crypt import REBUILD
from provision.system.mirror import SYNC

BEFORE = "before-update"  # of the snapshot, of its folder on the ESP and of its entry
ROLLED_BACK = "rolled-back"  # and the time
ROOT = "/@"
UPDATING = f"{STATE}/updating"  # in the updated system only, from its snapshot to its proof
PACKAGES_BEFORE = f"{STATE}/packages-before-update"
DAY_BEFORE = f"{STATE}/day-before-update"
SETTLE = "metal-settle-update"
SETTLE_UNIT = f"/etc/systemd/system/{SETTLE}.service"
ONLINE_S = 300
KEPT_MODULES = f"{STATE}/modules"  # where there are no snapshots, from before packages change to the proof
KEEP = "metal-keep-modules"
KEEP_UNIT = f"/etc/systemd/system/{KEEP}.service"

COMMON = f"""\
before=/.snapshots/{BEFORE} kept=/boot/{BEFORE} entry=/boot/loader/entries/{BEFORE}.conf
number() {{ btrfs inspect-internal rootid "$1" 2> /dev/null || true; }}
named() {{ sed -n 's/.*subvolid=\\([0-9]*\\).*/\\1/p' "$entry" 2> /dev/null || true; }}
booting() {{ sed -n 's/^default \\(.*\\)\\.conf$/\\1/p' /boot/loader/loader.conf 2> /dev/null || true; }}
choose() {{  # ENTRY: what boots from now on
  {{ echo "default $1.conf"; sed '/^default /d' /boot/loader/loader.conf || true; }} > /boot/loader/loader.new
  sync --file-system /boot
  mv -fT /boot/loader/loader.new /boot/loader/loader.conf
  sync --file-system /boot
}}
kernels_in() {{ find "$1" -maxdepth 1 -type f \\( -name 'vmlinuz-*' -o -name 'initramfs-*.img' \\); }}
copy_kernels() {{  # FROM TO: each whole or not at all
  local file
  for file in $(kernels_in "$1"); do
    cp "$file" "$2/kernel.new"
    sync --file-system "$2"
    mv -fT "$2/kernel.new" "$2/${{file##*/}}"
  done
  sync --file-system "$2"
}}
inner() {{ [[ ! -e $1 ]] || find "$1" -mindepth 1 -depth -type d -inum 256; }}  # subvolumes in a SUBVOLUME, deepest first
demand_unused() {{  # SUBVOLUME: those in it are systemd's, which makes them and leaves them empty
  inner "$1" | while read -r one; do
    [[ -z $(ls -A "$one") ]] || {{ echo "$one is a subvolume that holds something; if that may go: btrfs subvolume delete $one"; exit 1; }}
  done
}}
delete() {{
  [[ -e $1 ]] || return 0
  inner "$1" | while read -r one; do btrfs subvolume delete "$one"; done
  btrfs subvolume delete "$1"
}}
demand_boot() {{ mountpoint -q /boot || {{ echo '/boot is not mounted: kernels would go nowhere'; exit 1; }}; }}
sync_mirror() {{ if [[ -x {SYNC} ]]; then {SYNC}; fi; }}
"""


def default_entry(machine: Machine) -> str:
    return f"arch-{machine.system.kernels[0]}"


def has_snapshots(machine: Machine) -> bool:
    return machine.disk.filesystem == "btrfs"


def take_snapshot(machine: Machine) -> Step:
    """Where an update is under way already, its snapshot is of the system before: it stays."""
    return Script(
        "snapshot",
        why="the system as it is now, with its kernels, is an entry of the boot menu and what `rollback` goes back to",
        probe=f'{COMMON}[[ -e {UPDATING} && -s $entry && $(number "$before") == $(named) ]] && echo yes',
        script=f"""{COMMON}
demand_boot
[[ $(findmnt --noheadings --output FSROOT /) == {ROOT} ]]
main=/boot/loader/entries/{default_entry(machine)}.conf
grep -q 'subvol={ROOT}\\( \\|$\\)' "$main" || {{ echo "$main does not name the root as subvol={ROOT}: fab provision writes it anew"; exit 1; }}
need=$(kernels_in /boot | xargs -d '\\n' du --total --block-size=1M | tail -n 1 | cut -f 1)
left=$(df --block-size=1M --output=avail /boot | tail -n 1) freed=0
[[ ! -d $kept ]] || freed=$(du --summarize --block-size=1M "$kept" | cut -f 1)  # that of the last update goes
((left + freed > need + 8)) || {{ echo "/boot has $left MiB left, and a second set of kernels needs $need: take a kernel out, or make room"; exit 1; }}
for old in "$before" "$before.new"; do demand_unused "$old"; done
rm -f "$entry"  # first: an entry whose snapshot or kernels go must not stay
sync --file-system /boot
rm -rf "$kept" "$kept.new"
for old in "$before" "$before.new"; do delete "$old"; done
btrfs subvolume snapshot / "$before.new"
btrfs filesystem sync /
mv -T "$before.new" "$before"
mkdir "$kept.new"
copy_kernels /boot "$kept.new"
mv -T "$kept.new" "$kept"
sed -e "s/^title .*/title Arch Linux, as it was before the update of $(date +%F)/" -e 's,^linux /,linux /{BEFORE}/,' \\
  -e 's,^initrd /,initrd /{BEFORE}/,' -e "s,subvol={ROOT}\\( \\|$\\),subvolid=$(number "$before")\\1," "$main" > "$entry.new"
sync --file-system /boot
mv -fT "$entry.new" "$entry"
btrfs filesystem sync /
sync --file-system /boot
{record()}""",
    )


def record() -> str:
    """Bash: an update is under way; what there was before it. The lists' day is that of the newest package there can be."""
    return f"""mkdir -p {STATE}
pacman -Q > {PACKAGES_BEFORE}
newest=$(find /var/lib/pacman/sync -name '*.db' -printf '%T@ %p\\n' | sort -n | tail -n 1 | cut -d' ' -f2)
date --utc --reference "${{newest:-/var/lib/pacman/local}}" +%Y/%m/%d > {DAY_BEFORE}
date +%F > {UPDATING}
sync"""


def note_packages() -> Step:
    """Where there are no snapshots: what `rollback` goes back to is a day of the archive."""
    return Script(
        "note of the packages",
        why="no snapshots on this file system: `rollback` will take the packages of that day from the archive",
        probe=f"[[ -e {UPDATING} ]] && echo yes",
        script=f"{COMMON}{keep_modules()}\n{record()}",
    )


def keep_modules() -> str:
    """Bash: before all packages change without a snapshot.

    In a transaction pacman takes a kernel's modules away long before the new kernel is on the ESP. A machine that loses its
    power in between boots the old kernel, which without modules mounts no ESP and finds no network: so those of every
    kernel are kept aside, and a unit puts them back at such a boot, early.
    """
    unit = f"""\
[Unit]
Description=Modules of the kernel that an unfinished update took away
DefaultDependencies=no
ConditionPathExists={KEPT_MODULES}/%v
ConditionPathExists=!/usr/lib/modules/%v/kernel
After=systemd-remount-fs.service
Before=systemd-modules-load.service systemd-udev-trigger.service local-fs-pre.target sysinit.target

[Service]
Type=oneshot
ExecStart=/usr/bin/cp -a {KEPT_MODULES}/%v /usr/lib/modules/

[Install]
WantedBy=sysinit.target
"""
    return f"""demand_boot
mkdir -p {KEPT_MODULES}
aside={KEPT_MODULES}
for kernel in /usr/lib/modules/*/kernel; do
  version=${{kernel%/kernel}}
  version=${{version##*/}}
  [[ -d $kernel && ! -e $aside/$version ]] || continue
  rm -rf $aside/.new
  cp -al "/usr/lib/modules/$version" $aside/.new 2> /dev/null || {{ rm -rf $aside/.new; cp -a "/usr/lib/modules/$version" $aside/.new; }}
  rm -f $aside/.new/{{pkgbase,vmlinuz}}  # whatever makes an initramfs of each kernel would take it for one
  mv -T $aside/.new "$aside/$version"
done
printf %s {quote(unit)} > {KEEP_UNIT}
systemctl daemon-reload
systemctl enable {KEEP}.service"""


# The new kernel is on the ESP: without them it is plain that the one that runs is the old one.
DROP_RESTORED = f"""\
gone=/usr/lib/modules/$(uname -r)
if [[ -d {KEPT_MODULES}/${{gone##*/}} && ! -e $gone/pkgbase ]]; then rm -rf "$gone"; fi"""
FORGET_MODULES = f"""\
if [[ -e {KEEP_UNIT} ]]; then
  systemctl disable {KEEP}.service
  rm -f {KEEP_UNIT}
  systemctl daemon-reload
fi
rm -rf {KEPT_MODULES}"""


def upgrade(machine: Machine, packages: tuple[str, ...]) -> Step:
    """One transaction. Where nothing came of it, all is as before; where it broke off, the snapshot is what boots.

    An update under way may be given again: what an earlier try brought stays one that is to be proved or taken back.
    """
    guarded = has_snapshots(machine)
    main = default_entry(machine)
    stay = f'else choose "${{boots:-{BEFORE}}}"' if guarded else ""
    return Script(
        "upgrade",
        why="all packages, in one transaction; a full upgrade is the only one that Arch supports",
        probe="false",
        script=f"""{COMMON}
state() {{ pacman -Q | sha256sum; }}
was=$(state) boots=$(booting)
{f"choose {BEFORE}" if guarded else ""}
give_up() {{
  if [[ $(state) == "$was" && ! -e "$root"{STATE}/packages-in-doubt ]]; then
    if [[ $was == "$(sha256sum < {PACKAGES_BEFORE})" ]]; then
      {f"choose {main}" if guarded else FORGET_MODULES}
      rm -f {UPDATING}
    {stay}
    fi
    echo 'No package was changed.'
  else
    echo '{"Packages were changed. Until an update succeeds, the system from before it is what boots: fab rollback makes that the only one" if guarded else "Packages were changed: run the update again"}.'
  fi
  exit 1
}}
set +e  # and not `|| give_up`, in which bash would ignore errors inside
(set -e
{transaction(join(packages))})
code=$?
set -e
((code == 0)) || give_up
{fit_kernels()}
{f"choose {main}" if guarded else DROP_RESTORED}
sync_mirror""",
    )


def fit_kernels() -> str:
    """Bash: the ESP has the kernels of the modules, and an initramfs of each."""
    return f"""\
anew=
for base in /usr/lib/modules/*/pkgbase; do
  [[ -e $base ]] || continue
  image=${{base%/*}}/vmlinuz there=/boot/vmlinuz-$(< "$base")
  if [[ $(sha256sum < "$image") != "$(sha256sum < "$there" 2> /dev/null || true)" ]]; then
    echo "$there is not the kernel of the modules: copied anew"
    cp "$image" "$there.new" && mv -fT "$there.new" "$there"
    anew=yes
  fi
  [[ -s /boot/initramfs-$(< "$base").img ]] || anew=yes
done
if [[ $anew ]]; then {REBUILD}; fi
sync --file-system /boot"""


def arm(machine: Machine) -> Step:
    """Before the reboot into the update: the next boot is of it, and every other of the snapshot, until it came up.

    The machine settles that by itself, so that it does not depend on whoever restarted it. Where the firmware keeps no
    variables, the updated system is what boots.
    """
    main = default_entry(machine)
    unit = f"""\
[Unit]
Description=The updated system came up: it is what boots from now on
ConditionPathExists={UPDATING}
Wants=network-online.target
After=network-online.target sshd.service

[Service]
Type=oneshot
TimeoutStartSec=infinity
ExecStart=/bin/bash -euo pipefail {STATE}/settle

[Install]
WantedBy=multi-user.target
"""
    settle = f"""{COMMON}
for second in {{1..{ONLINE_S}}}; do
  if systemctl --quiet is-active sshd.service && [[ $(ip route show default; ip -6 route show default) ]]; then
    choose {main}
    sync_mirror
    exit
  fi
  sleep 1
done
echo 'no sshd, or no way to the network: the next boot is of the system from before the update'
exit 1
"""
    return Script(
        "way back",
        why="should the update not come up, the next restart is into the system from before it",
        probe="false",
        script=f"""{COMMON}
[[ -s $entry ]]
printf %s {quote(settle)} > {STATE}/settle
printf %s {quote(unit)} > {SETTLE_UNIT}
systemctl daemon-reload
systemctl enable {SETTLE}.service
choose {BEFORE}
bootctl set-oneshot {main}.conf || {{ echo 'the firmware takes no note: the update is what boots'; choose {main}; }}
sync_mirror
sync""",
    )


def finish(machine: Machine) -> Step:
    """After the proof: nothing of the update is left but what it can be taken back by."""
    main = default_entry(machine)
    return Script(
        "end of the update",
        why="it was verified: it is what boots, and the system from before stays for `rollback`",
        probe=f"[[ -e {UPDATING} ]] || echo yes",
        script=f"""{COMMON}
[[ ! -e {SETTLE_UNIT} ]] || systemctl stop {SETTLE}.service  # it may be at the same just now
{f"choose {main}; sync_mirror" if has_snapshots(machine) else ""}
if [[ -e {SETTLE_UNIT} ]]; then
  systemctl disable {SETTLE}.service
  rm -f {SETTLE_UNIT} {STATE}/settle
  systemctl daemon-reload
fi
{FORGET_MODULES}
rm -f {UPDATING}
sync""",
    )


def go_back() -> Step:
    """The snapshot takes the place of @, which stays as /.snapshots/rolled-back-DAY: nobody but a person knows what is in it.

    What boots then is the kernel that booted before the update, which another machine file may have replaced since.
    """
    return Script(
        "go back",
        why="the snapshot becomes the system; what was the system stays in /.snapshots until you delete it",
        probe="false",
        script=f"""{COMMON}
demand_boot
wanted=$(named)
[[ $wanted ]] || {{ echo "$entry names no snapshot"; exit 1; }}
for file in $(sed -n 's/^\\(linux\\|initrd\\) //p' "$entry"); do
  [[ -s /boot$file ]] || {{ echo "/boot$file is gone, without which the snapshot does not boot"; exit 1; }}
done
main=arch-$(sed -n 's,^linux /{BEFORE}/vmlinuz-,,p' "$entry")
if [[ ! -s /boot/loader/entries/$main.conf ]]; then
  sed -e "s/^title .*/title Arch Linux (${{main#arch-}})/" -e 's,/{BEFORE}/,/,' -e "s,subvolid=$wanted,subvol={ROOT}," "$entry" > "$entry.new"
  sync --file-system /boot
  mv -T "$entry.new" "/boot/loader/entries/$main.conf"
fi
top=$(mktemp --directory /run/metal-top.XXXXXX)
mount -o subvolid=5 "$(findmnt --nofsroot --noheadings --output SOURCE /)" "$top"
trap 'cd /; umount "$top"; rmdir "$top"' EXIT
if [[ $(number "$top{ROOT}") != "$wanted" ]]; then
  [[ $(number "$top/@snapshots/{BEFORE}") == "$wanted" ]] || {{ echo "/.snapshots/{BEFORE} is not the snapshot that $entry names"; exit 1; }}
  choose {BEFORE}  # by its number: it boots under whatever name
  if [[ -e $top{ROOT} ]]; then
    kept_as={ROLLED_BACK}-$(date +%F-%H%M%S)
    btrfs subvolume list -o "$top{ROOT}" | sed 's/.* path @//' | while read -r inner; do
      [[ -z $(ls -A "$top{ROOT}$inner") ]] || echo "a subvolume of its own, which is in no snapshot, stays in /.snapshots/$kept_as$inner"
    done
    mv -T "$top{ROOT}" "$top/@snapshots/$kept_as"
    btrfs filesystem sync "$top"
  fi
  mv -T "$top/@snapshots/{BEFORE}" "$top{ROOT}"
  btrfs filesystem sync "$top"
fi
copy_kernels "$kept" /boot
choose "$main"
rm -f "$entry"
sync --file-system /boot
rm -rf "$kept"
sync_mirror
sync""",
    )


def downgrade(archive: str) -> Step:
    """Without a snapshot: the packages of the day before the update, from the archive. Files of /etc stay as they are."""
    servers = quote(f"Server = {archive.rstrip('/')}/repos/DAY/$repo/os/$arch")
    return Script(
        "downgrade",
        why="no snapshot: all packages as the archive has them of the day before the update",
        probe="false",
        script=f"""{COMMON}{keep_modules()}
day=$(cat {DAY_BEFORE})
conf=$(mktemp) list=$(mktemp)
trap 'rm -f "$conf" "$list"' EXIT
line={servers}
printf '%s\\n' "${{line/DAY/$day}}" > "$list"
sed "s,^Include *= */etc/pacman.d/mirrorlist,Include = $list," /etc/pacman.conf > "$conf"
chmod 644 "$conf" "$list"
(set -e
{transaction("", '--config "$conf" -Syyuu')})
{fit_kernels()}
{DROP_RESTORED}
{FORGET_MODULES}
rm -f {UPDATING} {DAY_BEFORE}
sync""",
    )


# What an upgrade would bring, by lists of its own: those of the system stay in step with what is installed.
NEWER = """
lists=$(mktemp --directory /run/metal-lists.XXXXXX)
chmod 755 "$lists"  # pacman downloads as a user of its own
trap 'rm -rf "$lists"' EXIT
ln -s /var/lib/pacman/local "$lists/local"
said=$(pacman -Sy --dbpath "$lists" --logfile /dev/null --noprogressbar 2>&1) || { echo "@failed"; tail -n 5 <<< "$said"; exit 0; }
pacman -Qu --dbpath "$lists" || true
"""

# What a rollback would go back to: words, then packages as they are and as they were.
LOOK = f"""{COMMON}
echo "title $(sed -n 's/^title //p' "$entry" 2> /dev/null)"
echo "number $(named)"
echo "root $(number /)"
echo "day $(cat {DAY_BEFORE} 2> /dev/null)"
echo "updating $(cat {UPDATING} 2> /dev/null)"
echo '@now'; pacman -Q
echo '@then'
if [[ -d $before/var/lib/pacman ]]; then pacman --dbpath "$before/var/lib/pacman" -Q; else cat {PACKAGES_BEFORE} 2> /dev/null; fi
true
"""
