"""One root file system for everything: Debian packages, dressed as Arch.

The live medium and every package of the repository are cut from it. Needs root: device nodes,
owners and mounts. Commands run in mount and process namespaces of their own: no mount and no daemon outlives them.
"""

import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from provision.errors import ProvisionError
from provision.rehearsal import tools

STANDIN = Path(__file__).with_name("standin")


def words(text: str) -> tuple[str, ...]:
    """A list as a person writes it: words between blanks and lines."""
    return tuple(text.split())


SUITE = "bookworm"  # Python 3.11 for the guest's environment; the wheels are chosen for it
DEBIAN_PACKAGES = (
    # base: what Arch's package of that name, or its dependencies, would bring
    *words(
        "systemd-sysv systemd-boot systemd-resolved systemd-timesyncd libnss-resolve libpam-systemd udev dbus kmod"
    ),
    *words(
        "iproute2 iputils-ping procps less ca-certificates curl zstd locales gnupg pciutils e2fsprogs fdisk"
        " util-linux-extra psmisc"  # hwclock; fuser
    ),
    *words("pacman-package-manager makepkg libarchive-tools"),
    # packages of their own in the repository
    *words("linux-image-amd64 linux-image-cloud-amd64"),
    *words("openssh-server sudo python3 python3-distutils rsync zsh tmux nano htop"),
    *words("dosfstools btrfs-progs xfsprogs cryptsetup-bin efibootmgr gdisk parted arch-install-scripts"),
    *words("lvm2 mdadm systemd-zram-generator dropbear-bin"),
    *words("libtss2-esys-3.0.2-0 libtss2-mu0 libtss2-rc0 libtss2-tcti-device0"),
    *words("nftables network-manager wpasupplicant greetd"),
    # for the live medium
    *words("cloud-init"),
    # for the mkinitcpio stand-in
    *words("busybox-static cpio"),
)

OS_RELEASE = """\
NAME="Arch Linux"
PRETTY_NAME="Arch Linux"
ID=arch
BUILD_ID=rolling
ANSI_COLOR="38;2;23;147;209"
HOME_URL="https://archlinux.org/"
"""
ARCH_SERVER = "Server = https://geo.mirror.pkgbuild.com/$repo/os/$arch"

# (file in standin/, place in the root, mode)
STANDINS = (
    ("mkinitcpio", "usr/bin/mkinitcpio", 0o755),
    ("init", "usr/lib/initcpio/init", 0o755),
    ("cryptsetup_shell", "usr/share/mkinitcpio-utils/utils/shells/cryptsetup_shell", 0o755),
    ("mkinitcpio.conf", "etc/mkinitcpio.conf", 0o644),
    ("90-mkinitcpio-install.hook", "usr/share/libalpm/hooks/90-mkinitcpio-install.hook", 0o644),
    ("mkinitcpio-alpm", "usr/share/libalpm/scripts/mkinitcpio", 0o755),
    ("sshd.service", "usr/lib/systemd/system/sshd.service", 0o644),
    ("sshdgenkeys.service", "usr/lib/systemd/system/sshdgenkeys.service", 0o644),
    ("pacman.conf", "etc/pacman.conf", 0o644),
    ("sudoers", "etc/sudoers", 0o440),
)

# Debian's own ways, which would come back on a system that should look like Arch.
FOREIGN = words("""
    usr/bin/apt* usr/bin/dpkg* usr/bin/deb* usr/lib/apt usr/lib/dpkg usr/lib/init usr/share/debconf usr/share/lintian
    usr/share/initramfs-tools usr/lib/initramfs-tools usr/bin/*initramfs* etc/initramfs-tools etc/kernel etc/apt
    etc/init.d etc/rc?.d etc/cron.* etc/systemd/system/* usr/lib/systemd/system/ssh.service
    usr/lib/systemd/system/ssh.socket usr/lib/systemd/system/ssh@.service usr/lib/systemd/system/rescue-ssh.target
    usr/lib/systemd/system/apt-* usr/lib/systemd/system/dpkg-* usr/lib/systemd/system/e2scrub*
    usr/lib/systemd/system/man-db* usr/share/bug usr/share/menu var/lib/apt var/cache/apt var/lib/dpkg var/lib/initramfs-tools
    usr/local/sbin/update-initramfs etc/systemd/zram-generator.conf etc/modules-load.d/*zram* etc/cloud/cloud.cfg.d/90_dpkg.cfg
    etc/mdadm etc/logcheck var/cache/debconf var/log/* etc/ssh/ssh_host_* etc/machine-id etc/hostname etc/resolv.conf boot/* initrd.img* vmlinuz*
""")

# What no test looks at and an emulated disk would write for half a minute. Python's library stays whole.
BULK = words("""
    usr/share/doc/* usr/share/man/* usr/share/info/* usr/share/perl* usr/bin/perl* usr/lib/x86_64-linux-gnu/perl*
    usr/lib/x86_64-linux-gnu/libperl* usr/share/gcc* usr/share/gdb usr/share/common-licenses usr/lib/klibc*
    usr/share/zoneinfo/right usr/share/zoneinfo/posix usr/lib/udev/hwdb.bin usr/lib/udev/hwdb.d usr/share/bash-completion/*
""")
# Below `kernel/` in the folder of modules: what a virtual machine cannot have.
BULK_MODULES = words("""
    drivers/accel drivers/accessibility drivers/android drivers/ata/pata_* drivers/ata/sata_* drivers/atm drivers/auxdisplay
    drivers/bcma drivers/bluetooth drivers/bus drivers/comedi drivers/counter drivers/cpufreq drivers/crypto drivers/cxl
    drivers/dax drivers/dca drivers/devfreq drivers/dma drivers/edac drivers/extcon drivers/firewire drivers/fpga
    drivers/gnss drivers/gpio drivers/gpu drivers/greybus drivers/hid drivers/hsi drivers/hv drivers/hwmon drivers/hwtracing
    drivers/i2c drivers/i3c drivers/iio drivers/infiniband drivers/input drivers/ipack drivers/isdn drivers/leds
    drivers/macintosh drivers/mailbox drivers/mcb drivers/media drivers/memstick drivers/message drivers/mfd drivers/misc
    drivers/mmc drivers/most drivers/mtd drivers/mux drivers/net/arcnet drivers/net/can drivers/net/dsa
    drivers/net/ethernet drivers/net/fddi drivers/net/fjes drivers/net/hamradio drivers/net/hippi drivers/net/hyperv
    drivers/net/ieee802154 drivers/net/phy drivers/net/plip drivers/net/ppp drivers/net/slip drivers/net/team
    drivers/net/thunderbolt* drivers/net/usb drivers/net/vmxnet3 drivers/net/wan drivers/net/wireguard drivers/net/wireless
    drivers/net/wwan drivers/nfc drivers/ntb drivers/nvdimm drivers/parport drivers/pcmcia drivers/perf drivers/phy
    drivers/pinctrl drivers/platform drivers/power drivers/powercap drivers/pps drivers/ptp drivers/pwm drivers/rapidio
    drivers/regulator drivers/rpmsg drivers/scsi/[!sv]* drivers/scsi/smartpqi drivers/scsi/snic drivers/siox
    drivers/soundwire drivers/spi drivers/ssb drivers/staging drivers/target drivers/thermal drivers/thunderbolt
    drivers/tty drivers/ufs drivers/uio drivers/usb drivers/vdpa drivers/vfio drivers/vhost drivers/video drivers/virt
    drivers/visorbus drivers/w1 drivers/watchdog drivers/xen
    fs/9p fs/adfs fs/affs fs/afs fs/befs fs/bfs fs/cachefiles fs/ceph fs/coda fs/cramfs fs/dlm fs/ecryptfs fs/efs fs/erofs
    fs/f2fs fs/freevxfs fs/fscache fs/gfs2 fs/hfs fs/hfsplus fs/hpfs fs/jffs2 fs/jfs fs/ksmbd fs/lockd fs/minix fs/netfs
    fs/nfs fs/nfs_common fs/nfsd fs/nilfs2 fs/ntfs fs/ntfs3 fs/ocfs2 fs/omfs fs/orangefs fs/qnx4 fs/qnx6 fs/reiserfs
    fs/romfs fs/smb fs/sysv fs/ubifs fs/udf fs/ufs fs/vboxsf fs/zonefs
    net/6lowpan net/9p net/appletalk net/atm net/ax25 net/batman-adv net/bluetooth net/caif net/can net/ceph net/dccp
    net/dsa net/hsr net/ieee802154 net/l2tp net/lapb net/mac80211 net/mac802154 net/mpls net/netfilter/ipvs net/netrom
    net/nfc net/openvswitch net/phonet net/qrtr net/rds net/rose net/rxrpc net/sctp net/smc net/sunrpc net/tipc
    net/vmw_vsock net/wireless net/x25
    lib/test_* sound
""")
# Arch's kernels, and the flavour of Debian's that stands in for each. The general one is what boots everywhere:
# the medium too, which has `linux` on Arch. The cloud one, without drivers for SATA, is there to be a second.
KERNELS = {"linux-lts": "amd64", "linux": "cloud-amd64", "linux-zen": "cloud-amd64"}
BOOTED = "linux-lts"
KEPT_LOCALES = re.compile(r"(en|de|fr|es)_.*|i18n.*|translit.*|iso14651.*|cns11643.*|C|POSIX|locale")
KEPT_CHARMAPS = re.compile(r"(UTF-8|ISO-8859-1)\.gz")
KEPT_CONVERTERS = re.compile(r"UTF.*|ISO8859-1\.so|gconv-modules.*")

IN_ROOT = """
root=$1; shift
mount -t proc proc "$root/proc"
while [ "$1" != -- ]; do mount --bind "$1" "$root$2"; shift 2; done
shift
exec chroot "$root" "$@"
"""


def in_root(root: Path, argv: Sequence[str], log: Path, binds: Mapping[Path, str] | None = None) -> None:
    """Run a command inside a root, with /proc and the host folders `binds` at their places in it."""
    words = [word for host, place in (binds or {}).items() for word in (str(host), place)]
    inside = ["bash", "-euc", IN_ROOT, "in-root", str(root), *words, "--", *argv]
    shown = f"chroot {root.name} {' '.join(argv)}"
    alone = ["unshare", "--mount", "--propagation", "private", "--pid", "--fork", "--kill-child"]
    tools.run([*alone, "--", *inside], log=log, shown=shown)


def apt_lines(texts: Sequence[str]) -> list[str]:
    """Debian's repositories as the host reaches them, for our suite; none where it has none, as on Arch.

    `texts` are the host's apt sources, of either format. Only the addresses are taken from them. Without any,
    mmdebstrap and debootstrap take the mirror that they know.
    """
    addresses = re.findall(
        r"https?://[^\s\]]+",
        "\n".join(line for text in texts for line in text.splitlines() if "#" not in line),
    )

    def named(name: str) -> str | None:
        return next((address for address in addresses if address.rstrip("/").endswith(name)), None)

    main, security = named("/debian"), named("/debian-security")
    return [
        *([f"deb {main} {SUITE} main", f"deb {main} {SUITE}-updates main"] if main else []),
        *([f"deb {security} {SUITE}-security main"] if main and security else []),
    ]


def host_apt_sources() -> list[str]:
    folder = Path("/etc/apt")
    files = [folder / "sources.list", *sorted((folder / "sources.list.d").glob("*"))]
    return [file.read_text() for file in files if file.suffix in (".list", ".sources") and file.is_file()]


def build_debian(stage: Path, log: Path) -> None:
    """`root.tar`: the packages and what they depend on, nothing changed."""
    sources = apt_lines(host_apt_sources())
    if tools.find("mmdebstrap"):
        packages = f"--include={','.join(DEBIAN_PACKAGES)}"
        recommends = '--aptopt=APT::Install-Recommends "false"'
        unwanted = [f"/usr/share/{place}/*" for place in ("man", "doc", "info", "locale")]
        unwanted += [f"/lib/modules/*/kernel/{pattern}/*" for pattern in BULK_MODULES]
        paths = [f"--dpkgopt=path-exclude={place}" for place in unwanted]
        # mkinitcpio's stand-in makes the images: Debian's own would take a minute
        hook = '--essential-hook=ln -s /bin/true "$1/usr/local/sbin/update-initramfs"'
        options = ["--variant=minbase", "--mode=root", "--format=tar", packages, recommends, *paths, hook]
        tools.run(["mmdebstrap", *options, SUITE, stage / "root.tar", *sources], log=log)
        return
    root = stage / "root"
    mirror = [source.split()[1] for source in sources[:1]]
    packages = f"--include={','.join(DEBIAN_PACKAGES)}"
    tools.run(["debootstrap", "--variant=minbase", packages, SUITE, root, *mirror], log=log)
    tools.run(["tar", "-C", root, "--numeric-owner", "-cf", stage / "root.tar", "."], log=log)
    shutil.rmtree(root)


def build_rootfs(stage: Path, debian: Path, log: Path) -> None:
    """`root/` dressed as Arch, and `owners.json`: path → Debian package, from dpkg's lists."""
    root = stage / "root"
    root.mkdir()
    tools.run(["tar", "-C", root, "--numeric-owner", "--xattrs", "-xf", debian / "root.tar"], log=log)
    (stage / "owners.json").write_text(json.dumps(dpkg_owners(root)))
    merge_sbin(root)
    for flavour in set(KERNELS.values()):
        place_kernel(root, flavour)
    for pattern in FOREIGN + BULK:
        remove(root, pattern)
    slim(root)
    install_standins(root)
    write_arch_files(root)
    in_root(root, ["groupadd", "--system", "wheel"], log)
    for flavour in set(KERNELS.values()):
        in_root(root, ["depmod", flavour_version(root, flavour)], log)
    in_root(root, ["mkinitcpio", "--prebuild"], log)


def canonical(path: str) -> str:
    """A path of Debian as it is on Arch: below usr, and sbin is bin."""
    path = path.strip().lstrip("/")
    path = re.sub(r"^(bin|sbin|lib|lib64)(/|$)", r"usr/\1\2", path)
    return re.sub(r"^usr/sbin(/|$)", r"usr/bin\1", path)


def dpkg_owners(root: Path) -> dict[str, str]:
    owners: dict[str, str] = {}
    for file in (root / "var/lib/dpkg/info").glob("*.list"):
        package = file.name.removesuffix(".list").split(":")[0]
        owners |= {canonical(line): package for line in file.read_text().splitlines()}
    return owners


def merge_sbin(root: Path) -> None:
    """One folder for programs, as on Arch: so a PATH without sbin finds `useradd`, as it would there."""
    programs = root / "usr/bin"
    for file in (root / "usr/sbin").iterdir():
        if not (programs / file.name).is_symlink() and not (programs / file.name).exists():
            file.rename(programs / file.name)
    shutil.rmtree(root / "usr/sbin")
    (root / "usr/sbin").symlink_to("bin")


def flavour_version(root: Path, flavour: str) -> str:
    """The release of Debian's kernel of that flavour, which is the name of its folder of modules."""
    pattern = re.compile(rf"[\d.]+-\d+-{re.escape(flavour)}")
    versions = [folder.name for folder in (root / "usr/lib/modules").iterdir()]
    matching = [version for version in versions if pattern.fullmatch(version)]
    if len(matching) != 1:
        raise ProvisionError(f"Expected one kernel {flavour} in {root}, found {versions or 'none'}.")
    return matching[0]


def kernel_version(root: Path, package: str = BOOTED) -> str:
    """The release of the kernel that stands in for a package of Arch."""
    return flavour_version(root, KERNELS[package])


def place_kernel(root: Path, flavour: str) -> None:
    """The image where Arch's packages have it, beside its modules."""
    version = flavour_version(root, flavour)
    modules = root / "usr/lib/modules" / version
    (root / "boot" / f"vmlinuz-{version}").rename(modules / "vmlinuz")
    for link in ("build", "source"):
        (modules / link).unlink(missing_ok=True)
    for pattern in BULK_MODULES:
        remove(modules / "kernel", pattern)


def remove(root: Path, pattern: str) -> None:
    """Files and trees that match; a pattern may match nothing, since Debian's versions differ."""
    plain = not any(letter in pattern for letter in "*?[")  # glob would miss a link that leads nowhere
    for path in [root / pattern] if plain else list(root.glob(pattern)):
        if not os.path.lexists(path):
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def slim(root: Path) -> None:
    for folder, kept in (
        ("usr/share/i18n/locales", KEPT_LOCALES),
        ("usr/share/i18n/charmaps", KEPT_CHARMAPS),
        ("usr/lib/x86_64-linux-gnu/gconv", KEPT_CONVERTERS),
    ):
        for file in (root / folder).iterdir():
            if file.is_file() and not kept.fullmatch(file.name):
                file.unlink()


def install_standins(root: Path) -> None:
    for name, place, mode in STANDINS:
        write(root, place, (STANDIN / name).read_text(), mode)


def write(root: Path, place: str, text: str, mode: int = 0o644) -> None:
    target = root / place
    target.parent.mkdir(parents=True, exist_ok=True)
    target.unlink(missing_ok=True)  # a link of Debian's must not be written through
    target.write_text(text)
    target.chmod(mode)


def write_arch_files(root: Path) -> None:
    for mount_point in ("proc", "sys"):
        (root / mount_point).chmod(0o555)  # as pacstrap makes them
    pacman_key = (root / "usr/bin/pacman-key").read_text()  # Debian's looks for keyrings in another place
    write(
        root,
        "usr/bin/pacman-key",
        pacman_key.replace("'/usr/share/keyrings'", "'/usr/share/pacman/keyrings'"),
        0o755,
    )
    write(root, "usr/lib/os-release", OS_RELEASE)
    write(root, "etc/arch-release", "")
    write(root, "etc/issue", "Arch Linux \\r (\\l)\n\n")
    write(root, "etc/pacman.d/mirrorlist", f"#{ARCH_SERVER}\n")
    write(root, "usr/lib/systemd/system-preset/99-default.preset", "disable *\n")
    write(
        root, "etc/NetworkManager/NetworkManager.conf", "# Arch's says nothing either\n"
    )  # Debian's asks ifupdown


def files(root: Path) -> Iterator[str]:
    """Every path below a root, relative; folders end in `/`, links are files."""
    for folder, folders, names in os.walk(root):
        inside = Path(folder).relative_to(root)
        yield from (str(inside / name) for name in names)
        for name in folders:
            yield str(inside / name) + ("" if (Path(folder) / name).is_symlink() else "/")
