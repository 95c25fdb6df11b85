"""A pacman repository under Arch's names, cut from the root file system, with stand-ins for the rest.

Names are Arch's and nothing more is there: what provision asks for and Arch does not call so fails.
"""

import json
import shutil
import zipfile
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath

from provision.rehearsal import tools
from provision.rehearsal.likeness import StandIns
from provision.rehearsal.rootfs import KERNELS, STANDIN, STANDINS, files, in_root, kernel_version, words
from provision.rehearsal.signing import INSTALL, keyring_files, sign

IDLE = "[Service]\nType=oneshot\nRemainAfterExit=yes\nExecStart=/usr/bin/true\n\n[Install]\nWantedBy=multi-user.target\n"
YEARLY = "[Timer]\nOnCalendar=yearly\n\n[Install]\nWantedBy=timers.target\n"
BUILD_DATE = 1_700_000_000  # a constant: the same inputs make the same packages


@dataclass(frozen=True)
class Package:
    """One package. `debian` are the Debian packages whose files are its; `extra` maps a path to (content, mode)."""

    name: str
    repository: str = "extra"
    debian: tuple[str, ...] = ()
    depends: tuple[str, ...] = ("base",)
    provides: tuple[str, ...] = ()
    conflicts: tuple[str, ...] = ()
    backup: tuple[str, ...] = ()
    groups: tuple[str, ...] = ()
    extra: Mapping[str, tuple[bytes, int]] = field(default_factory=dict)
    install: str = ""
    version: str = "1-1"
    description: str = "stand-in"


def refusing(name: str) -> tuple[bytes, int]:
    """A program that says what it is and fails: one that claimed success would prove nothing."""
    return (
        f'#!/bin/sh\necho "{name}: a stand-in of the rehearsal, it does nothing" >&2\nexit 1\n'.encode(),
        0o755,
    )


def standin(name: str, repository: str = "extra", programs: str = "", depends: str = "base") -> Package:
    """A package with a file that says what it is, and with programs that refuse."""
    content = {f"usr/bin/{program}": refusing(program) for program in words(programs)}
    content[f"usr/share/rehearsal/{name}"] = (b"a stand-in of the rehearsal\n", 0o644)
    return Package(name, repository, depends=words(depends), extra=content)


def empty_archive() -> bytes:
    """A cpio archive of the newc format without a file: an early initramfs that brings no microcode."""
    name = b"TRAILER!!!\0"
    return (b"070701" + b"00000000" * 11 + b"%08X" % len(name) + b"00000000" + name).ljust(512, b"\0")


def unit(text: str) -> tuple[bytes, int]:
    return text.encode(), 0o644


# Real programs, which Debian built.
CUT = (
    Package(
        "openssh",
        "core",
        ("openssh-server", "openssh-sftp-server", "openssh-client"),
        backup=("etc/ssh/sshd_config",),
    ),
    Package("sudo", "core", ("sudo",), backup=("etc/sudoers",)),
    Package("python", "core"),  # by its folder: Debian splits the library over many packages
    Package("cryptsetup", "core", ("cryptsetup-bin",), depends=("filesystem",)),  # of base, through systemd
    Package("btrfs-progs", "core", ("btrfs-progs",)),
    Package("xfsprogs", "core", ("xfsprogs", "libinih1", "liburcu8")),
    Package("lvm2", "core", words("lvm2 dmeventd liblvm2cmd2.03 libdevmapper-event1.02.1 libaio1")),
    Package("mdadm", "core", ("mdadm",)),
    Package(
        "tpm2-tss",
        "core",
        words(
            "libtss2-esys-3.0.2-0 libtss2-mu0 libtss2-rc0 libtss2-sys1 libtss2-tcti-cmd0 libtss2-tcti-device0 libtss2-tcti-mssim0 libtss2-tcti-swtpm0 tpm-udev"
        ),
    ),
    Package("zram-generator", debian=("systemd-zram-generator",)),
    Package("dropbear", debian=("dropbear-bin", "libtomcrypt1", "libtommath1")),
    Package(
        "cloud-init",
        debian=words("""
            cloud-init eject isc-dhcp-client isc-dhcp-common lsb-release libyaml-0-2 python3-attr python3-blinker
            python3-certifi python3-cffi-backend python3-chardet python3-charset-normalizer python3-configobj
            python3-cryptography python3-idna python3-importlib-metadata python3-importlib-resources python3-jinja2
            python3-json-pointer python3-jsonpatch python3-jsonschema python3-jwt python3-markupsafe
            python3-more-itertools python3-netifaces python3-oauthlib python3-pkg-resources python3-pyrsistent
            python3-requests python3-serial python3-six python3-typing-extensions python3-urllib3 python3-yaml
            python3-zipp
        """),
        depends=("base", "python"),
    ),
    Package("dosfstools", "core", ("dosfstools",)),
    Package("efibootmgr", "core", ("efibootmgr",)),
    Package("less", "core", ("less",)),
    Package("nano", "core", ("nano",)),
    Package("rsync", debian=("rsync",)),
    Package("zsh", debian=("zsh", "zsh-common")),
    Package("tmux", debian=("tmux",)),
    Package("htop", debian=("htop",)),
    Package("gptfdisk", debian=("gdisk",)),
    Package("parted", debian=("parted",)),
    Package("arch-install-scripts", debian=("arch-install-scripts",)),
    Package("nftables", debian=("nftables", "libnftables1"), backup=("etc/nftables.conf",)),
    Package("wpa_supplicant", "core", ("wpasupplicant",)),
    Package("networkmanager", debian=("network-manager", "libnm0"), depends=("base", "wpa_supplicant")),
    Package(
        "greetd",
        debian=("greetd",),
        backup=("etc/greetd/config.toml",),
        install="post_install() {\n  useradd --system --create-home --groups video greeter\n}\n",
    ),
)
# What Debian calls minimal, in one package that stands for all that Arch's `base` depends on.
SYSTEM = Package(
    "filesystem",
    "core",
    depends=(),
    provides=words("""
        bash bzip2 ca-certificates coreutils curl dbus device-mapper e2fsprogs file findutils gawk
        glibc gnupg grep gzip iproute2 iputils kbd kmod pacman pacman-mirrorlist pciutils procps-ng psmisc sed shadow
        systemd systemd-sysvcompat tar tzdata util-linux xz zstd
    """),
    backup=words(
        "etc/passwd etc/shadow etc/group etc/gshadow etc/pacman.conf etc/pacman.d/mirrorlist etc/locale.gen"
    ),
    install="post_install() {\n  systemd-machine-id-setup\n}\n",
    description="Debian's minimal system",
)
BASE = Package(
    "base",
    "core",
    depends=("filesystem", "archlinux-keyring", "cryptsetup"),
    description="as on Arch, a list of others",
)
MKINITCPIO = Package(
    "mkinitcpio", "core", ("busybox-static", "cpio"), version="40-1", provides=("initramfs",)
)


def hooks(name: str, hook: str, depends: str) -> Package:
    """A package that brings a hook of mkinitcpio. What it does is done by the stand-in, which knows it by its file."""
    text = (b"# Done by the stand-in of mkinitcpio.\n", 0o644)
    places = {f"usr/lib/initcpio/{folder}/{hook}": text for folder in ("install", "hooks")}
    return Package(name, depends=words(depends), extra=places)


HOOKS = (
    hooks("mkinitcpio-nfs-utils", "net", "base mkinitcpio"),
    hooks("mkinitcpio-netconf", "netconf", "base mkinitcpio-nfs-utils"),
    hooks("mkinitcpio-dropbear", "dropbear", "base dropbear mkinitcpio"),
    hooks("mkinitcpio-utils", "encryptssh", "base mkinitcpio"),
)
# Finished parts of initramfs images lie in the package whose files they hold; those of modules with the kernels.
PREBUILT = "usr/lib/initcpio/prebuilt/"
PREBUILT_IN = {
    "base.img": MKINITCPIO.name,
    "encrypt.img": "cryptsetup",
    "tpm2.img": "tpm2-tss",
    "ssh.img": "mkinitcpio-dropbear",
}

# A greeter that shows nothing and waits: a terminal's is of no use without a screen.
TUIGREET = {"usr/bin/tuigreet": (b"#!/bin/sh\nexec sleep infinity\n", 0o755)}
DESKTOP = words("""
    dmenu foot i3-wm i3lock i3status noto-fonts sway swaybg swayidle swaylock ttf-dejavu wmenu xorg-server xorg-xinit xorg-xrdb
    xorg-xwayland xss-lock xterm
""")
REFLECTOR = {
    "usr/lib/systemd/system/reflector.service": unit(
        "[Service]\nType=oneshot\nExecStart=/usr/bin/reflector\n"
    ),
    "usr/lib/systemd/system/reflector.timer": unit(
        "[Timer]\nOnCalendar=weekly\n\n[Install]\nWantedBy=timers.target\n"
    ),
}
PACCACHE = {
    "usr/lib/systemd/system/paccache.service": unit(
        "[Service]\nType=oneshot\nExecStart=/usr/bin/paccache -r\n"
    ),
    "usr/lib/systemd/system/paccache.timer": unit(
        "[Timer]\nOnCalendar=weekly\n\n[Install]\nWantedBy=timers.target\n"
    ),
}
STAND_INS = (
    standin("linux-firmware", "core"),
    replace(standin("amd-ucode", "core"), extra={"boot/amd-ucode.img": (empty_archive(), 0o644)}),
    replace(standin("intel-ucode"), extra={"boot/intel-ucode.img": (empty_archive(), 0o644)}),
    standin("base-devel", "core", depends="gcc make"),
    standin("gcc", "core", "gcc g++ cc c++"),
    standin("make", "core", "make"),
    standin("man-db", "core", "man"),
    Package(
        "dkms",
        extra={
            "usr/bin/dkms": ((STANDIN / "dkms").read_bytes(), 0o755),
            "usr/share/libalpm/hooks/70-dkms-install.hook": (
                (STANDIN / "70-dkms-install.hook").read_bytes(),
                0o644,
            ),
        },
    ),
    standin("git", programs="git"),
    standin("vim", programs="vim vi"),
    replace(
        standin("pacman-contrib", programs="paccache pacdiff checkupdates"),
        extra={**standin("pacman-contrib", programs="paccache pacdiff checkupdates").extra, **PACCACHE},
    ),
    Package(
        "nvidia-open-dkms",
        depends=("base", "dkms", "nvidia-utils"),
        extra={"usr/src/nvidia-1/dkms.conf": unit('PACKAGE_NAME="nvidia"\nPACKAGE_VERSION="1"\n')},
    ),
    Package("greetd-tuigreet", depends=("base", "greetd"), extra=TUIGREET),
    Package("reflector", extra={**standin("reflector", programs="reflector").extra, **REFLECTOR}),
    standin("wireless-regdb", "core"),
    *(standin(name) for name in DESKTOP),
    standin("nvidia-container-toolkit", programs="nvidia-ctk", depends="base nvidia-utils"),
    standin("cuda", programs="nvcc"),
)


def nvidia_utils() -> Package:
    programs = standin("nvidia-utils", programs="nvidia-smi nvidia-persistenced nvidia-modprobe")
    service = (STANDIN / "nvidia-persistenced.service").read_bytes()
    return replace(
        programs,
        extra={**programs.extra, "usr/lib/systemd/system/nvidia-persistenced.service": (service, 0o644)},
    )


def nvidia_modules(root: Path, name: str, kernel: str) -> Package:
    """A driver's package: a module of Debian's kernel under the name `nvidia`, which modinfo finds as it would the real one."""
    version = kernel_version(root, kernel)
    module = next((root / "usr/lib/modules" / version / "kernel").rglob("virtio_pci.ko")).read_bytes()
    return replace(
        standin(name, depends=f"base {kernel} nvidia-utils"),
        extra={f"usr/lib/modules/{version}/extramodules/nvidia.ko": (module, 0o644)},
        install=f"post_install() {{\n  depmod {version}\n}}\n",
    )


def headers(root: Path, kernel: str) -> Package:
    """What dkms looks for before it builds."""
    same = [other for other in KERNELS if other != kernel and KERNELS[other] == KERNELS[kernel]]
    return Package(
        f"{kernel}-headers",
        "core",
        conflicts=tuple(f"{other}-headers" for other in same),
        extra={f"usr/lib/modules/{kernel_version(root, kernel)}/build/Makefile": unit("# a stand-in\n")},
    )


def uv(wheel: Path) -> Package:
    """The real uv, out of its wheel."""
    with zipfile.ZipFile(wheel) as archive:
        names = [
            name for name in archive.namelist() if name.endswith((".data/scripts/uv", ".data/scripts/uvx"))
        ]
        content = {f"usr/bin/{Path(name).name}": (archive.read(name), 0o755) for name in names}
    return Package(
        "uv", extra=content, version=f"{wheel.name.split('-')[1]}-1", description="uv, from its wheel"
    )


def split(root: Path, owners: Mapping[str, str]) -> dict[str, list[str]]:
    """Every path of the root by the package that it goes into; what nobody claims is the system's.

    Modules and their part of an initramfs go into `kernel VERSION`. A folder goes where all that is in it does.
    """
    claims = {debian: package.name for package in (*CUT, MKINITCPIO) for debian in package.debian}
    ours = {place: "mkinitcpio" for _, place, _ in STANDINS if "initcpio" in place}
    ours |= {place: "mkinitcpio-utils" for _, place, _ in STANDINS if "mkinitcpio-utils" in place}
    ours |= {f"usr/lib/systemd/system/{name}": "openssh" for name in ("sshd.service", "sshdgenkeys.service")}
    ours |= {PREBUILT + name: package for name, package in PREBUILT_IN.items()}

    def part_of(path: str) -> str:
        if path.startswith("usr/lib/modules/"):
            return f"kernel {path.split('/')[3]}"
        if path.startswith(PREBUILT + "modules-"):
            return f"kernel {PurePosixPath(path).name.removeprefix('modules-').removesuffix('.img')}"
        if claimed := ours.get(path) or claims.get(owners.get(path, "")):
            return claimed
        if path.startswith(("usr/lib/python3", "usr/bin/py")):
            return "python"
        return SYSTEM.name

    found = [path for path in files(root) if not outside(path)]
    parts: dict[str, list[str]] = {}
    inside: dict[str, set[str]] = {}  # folder → packages of the files below it
    for path in found:
        if not path.endswith("/"):
            part = part_of(path)
            parts.setdefault(part, []).append(path)
            for parent in PurePosixPath(path).parents:
                inside.setdefault(str(parent), set()).add(part)
    for path in found:
        if path.endswith("/"):
            folder = path.rstrip("/")
            below = inside.get(folder, {SYSTEM.name})
            parts.setdefault(min(below) if len(below) == 1 else SYSTEM.name, []).append(folder)
    return parts


def outside(path: str) -> bool:
    """What no package of Arch's brings: other file systems, traces of the build."""
    top = path.split("/")[0]
    if top in ("boot", "dev", "proc", "sys", "run", "tmp", "mnt", "media", "home", "root"):
        return path != f"{top}/"
    return path in ("etc/fstab", "etc/.pwd.lock") or path.endswith(("group-", "passwd-", "shadow-"))


def pkginfo(package: Package, size_bytes: int) -> str:
    """The package's `.PKGINFO`."""
    single = {
        "pkgname": package.name,
        "pkgbase": package.name,
        "pkgver": package.version,
        "pkgdesc": package.description,
        "url": "https://archlinux.org/",
        "builddate": BUILD_DATE,
        "packager": "rehearsal",
        "size": size_bytes,
        "arch": "x86_64",
        "license": "custom",
    }
    several = {
        "provides": package.provides,
        "conflict": package.conflicts,
        "backup": package.backup,
        "group": package.groups,
        "depend": package.depends,
    }
    lines = [f"{key} = {value}" for key, value in single.items()]
    lines += [f"{key} = {value}" for key, values in several.items() for value in values]
    return "\n".join(lines) + "\n"


def pack(package: Package, paths: Sequence[str], root: Path, repository: Path, log: Path) -> None:
    """Write one `.pkg.tar.zst` into `repository`/core or extra; `paths` are taken from the root."""
    staging = repository / "staging"
    content = staging / "content"
    content.mkdir(parents=True)
    for place, (data, mode) in package.extra.items():
        target = content / place
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(data)
        target.chmod(mode)
    size_bytes = sum((root / path).lstat().st_size for path in paths if not (root / path).is_dir())
    size_bytes += sum(len(data) for data, _ in package.extra.values())
    (staging / ".PKGINFO").write_text(pkginfo(package, size_bytes))
    (staging / "paths").write_text("".join(f"{path}\0" for path in sorted(paths)))
    described = [".PKGINFO"]
    if package.install:
        (staging / ".INSTALL").write_text(package.install)
        described.append(".INSTALL")
    folder = repository / package.repository / "os/x86_64"
    folder.mkdir(parents=True, exist_ok=True)
    archive = folder / f"{package.name}-{package.version}-x86_64.pkg.tar.zst"
    command = ["tar", "-I", "zstd -q -3 -T0", "--format=posix", "--numeric-owner", "-cf", str(archive)]
    command += [
        "-C",
        str(staging),
        *described,
        "-C",
        str(content),
        *sorted(path.name for path in content.iterdir()),
    ]
    command += ["-C", str(root), "--no-recursion", "--null", "-T", str(staging / "paths")]
    tools.run(command, log=log)
    shutil.rmtree(staging)


def build_repository(stage: Path, rootfs: Path, uv_wheel: Path, signing: Path, log: Path) -> None:
    """`core/os/x86_64` and `extra/os/x86_64` with packages, their signatures and databases."""
    root = rootfs / "root"
    parts = split(root, json.loads((rootfs / "owners.json").read_text()))
    keyring = Package(
        "archlinux-keyring",
        "core",
        depends=(SYSTEM.name,),
        extra=keyring_files(signing),
        install=INSTALL,
        description="the key of this repository",
    )
    for package in (SYSTEM, *CUT, MKINITCPIO, *HOOKS):
        pack(package, parts.get(package.name, ()), root, stage, log)
    for name, flavour in KERNELS.items():
        version = kernel_version(root, name)
        package = Package(
            name,
            "core",
            depends=("base", "initramfs"),
            conflicts=tuple(other for other in KERNELS if other != name and KERNELS[other] == flavour),
            extra={f"usr/lib/modules/{version}/pkgbase": (f"{name}\n".encode(), 0o644)},
            version=f"{version.split('-')[0]}-1",
            description=f"Debian's kernel {flavour} standing in",
        )
        pack(package, parts[f"kernel {version}"], root, stage, log)
    drivers = [
        nvidia_modules(root, "nvidia-open", "linux"),
        nvidia_modules(root, "nvidia-open-lts", "linux-lts"),
    ]
    drivers += [headers(root, kernel) for kernel in KERNELS]
    for package in (BASE, keyring, *STAND_INS, nvidia_utils(), *drivers, uv(uv_wheel)):
        pack(package, (), root, stage, log)
    for repository in ("core", "extra"):
        names = sorted(path.name for path in archives(stage, repository))
        add_to_database(stage, repository, names, root, signing, log)


def archives(folder: Path, repository: str) -> list[Path]:
    return list((folder / repository / "os/x86_64").glob("*.pkg.tar.zst"))


def add_to_database(
    stage: Path, repository: str, names: Sequence[str], root: Path, signing: Path, log: Path
) -> None:
    """Sign these packages of a repository and enter them into its database."""
    folder = PurePosixPath(repository, "os/x86_64")
    sign(signing, stage, [folder / name for name in names], root, log)
    places = [str("/mnt" / folder / name) for name in (f"{repository}.db.tar.gz", *names)]
    in_root(root, ["repo-add", "--quiet", *places], log, binds={stage: "/mnt"})


def known_packages(folder: Path) -> set[str]:
    """Names that the repositories in a folder know, also those that a package only provides."""
    names = {path.name.rsplit("-", 3)[0] for name in ("core", "extra") for path in archives(folder, name)}
    return names | {name for package in (SYSTEM, *CUT, MKINITCPIO) for name in package.provides}


def do_nothing(stand_ins: StandIns, existing: Collection[str]) -> list[Package]:
    """Packages for what a machine file names. The first brings the units that do not exist, and the groups of people."""
    units: dict[str, tuple[bytes, int]] = {}
    for name in sorted({*stand_ins.units} - {*existing}):
        stem, _, kind = name.rpartition(".")
        units[f"usr/lib/systemd/system/{stem}.service"] = unit(IDLE)
        if kind == "timer":
            units[f"usr/lib/systemd/system/{name}"] = unit(YEARLY)
    made = [standin(name) for name in stand_ins.packages]
    made += [replace(standin(f"{name}-of-the-rehearsal"), groups=(name,)) for name in stand_ins.groups]
    if made:
        accounts = "".join(f"  groupadd --system --force {name}\n" for name in stand_ins.accounts)
        install = f"post_install() {{\n{accounts}}}\n" if accounts else ""
        made[0] = replace(made[0], extra={**made[0].extra, **units}, install=install)
    return made


def add_stand_ins(
    stage: Path, repository: Path, stand_ins: StandIns, root: Path, signing: Path, log: Path
) -> None:
    """The repository with these packages too."""
    tools.run(["cp", "--archive", "--reflink=auto", f"{repository}/.", stage], log=log)
    made = do_nothing(stand_ins, [path.name for path in (root / "usr/lib/systemd/system").iterdir()])
    for package in made:
        pack(package, (), root, stage, log)
    wanted = {package.name for package in made}
    names = sorted(path.name for path in archives(stage, "extra") if path.name.rsplit("-", 3)[0] in wanted)
    add_to_database(stage, "extra", names, root, signing, log)
