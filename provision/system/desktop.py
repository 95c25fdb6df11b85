"""A desktop: sway on Wayland or i3 on X11.

These two, since they are one desktop twice: the same keys and the same configuration language, small, in Arch's own
repositories, and wholly in text files, so that scale, DPI and fonts can be said for every user in /etc, and what a
person has in ~/.config goes before it. (GNOME left X11; of KDE's settings most lie in the user's own files.)
greetd logs in: it is the same for both, and its autologin is one section of one file.
"""

from collections.abc import Iterator
from dataclasses import replace

from provision.facts import Facts
from provision.machine import Machine
from provision.steps import File, Packages, Step, Unit
from provision.system.gpu import driver_of
from provision.system.scale import Sizes, sizes_of

SESSION = "/usr/local/bin/metal-desktop"
FONTS = ("noto-fonts", "ttf-dejavu")
PACKAGES = {
    "sway": ("sway", "swaybg", "swayidle", "swaylock", "foot", "wmenu", "xorg-xwayland", *FONTS),
    "i3": (
        "i3-wm",
        "i3lock",
        "i3status",
        "dmenu",
        "xorg-server",
        "xorg-xinit",
        "xorg-xrdb",
        "xss-lock",
        "xterm",
        *FONTS,
    ),
}
CURSOR_PX = 24


def desktop(machine: Machine, facts: Facts) -> Iterator[Step]:
    """On the installed system, after what makes it a training machine."""
    wanted = machine.desktop
    if facts.system != "installed" or wanted.kind == "none":
        return
    sizes, sure = sizes_of(machine, facts)
    yield Packages(*PACKAGES[wanted.kind], "greetd", "greetd-tuigreet", why=f"{wanted.kind}, and its login")
    if wanted.kind == "sway":
        steps = [*sway(machine, sizes, nvidia=driver_of(machine, facts) is not None)]
    else:
        steps = [*i3(machine, sizes)]
    yield from (step if sure or step.why != told(sizes) else once(step) for step in steps)
    yield File(
        "/etc/greetd/config.toml",
        greetd(machine),
        why="asks who logs in" + (f"; at boot {machine.user.name} is" if wanted.autologin else ""),
    )
    yield Unit("greetd.service", why="login to the desktop")


def once(step: Step) -> Step:
    """The same file, but one that is there stays: no screen says how large it is now, and it may have said before."""
    path = step.name.removeprefix("file ")
    return replace(
        step, probe=f"test -s {path} && echo there", expect="there", why=f"{step.why}; no screen is seen"
    )


def greetd(machine: Machine) -> str:
    first = f'\n[initial_session]\ncommand = "{SESSION}"\nuser = "{machine.user.name}"\n'
    return (
        "[terminal]\nvt = 1\n\n[default_session]\n"
        f'command = "tuigreet --time --remember --cmd {SESSION}"\nuser = "greeter"\n'
        + (first if machine.desktop.autologin else "")
    )


def told(sizes: Sizes) -> str:
    return f"scale {sizes.scale_percent} %, {sizes.dpi} dpi, letters of {sizes.font_points:g} points"


def gtk(sizes: Sizes) -> Iterator[Step]:
    for version in ("3.0", "4.0"):
        yield File(
            f"/etc/gtk-{version}/settings.ini",
            f"[Settings]\ngtk-font-name = Noto Sans {sizes.font_points:g}\n",
            why=told(sizes),
        )


def sway(machine: Machine, sizes: Sizes, *, nvidia: bool) -> Iterator[Step]:
    """Sway's own /etc/sway/config includes what lies in config.d."""
    layout, _, variant = machine.desktop.keyboard.partition(" ")
    output = machine.desktop.screen or "*"
    yield File(
        "/etc/sway/config.d/10-metal.conf",
        f"output {output} scale {sizes.scale_percent / 100:g}\nfont pango:monospace {sizes.font_points:g}\n"
        f"seat * xcursor_theme default {CURSOR_PX}\n"
        f"input type:keyboard {{\n  xkb_layout {layout}\n"
        + (f"  xkb_variant {variant}\n" if variant else "")
        + "}\n",
        why=told(sizes),
    )
    yield File(
        "/etc/xdg/foot/foot.ini",
        f"font=monospace:size={sizes.font_points:g}\n",
        why=told(sizes),
    )
    yield from gtk(sizes)
    # Beside NVIDIA's modules sway refuses to start without it.
    option = " --unsupported-gpu" if nvidia else ""
    yield File(
        SESSION,
        f"#!/bin/sh\nexport XDG_CURRENT_DESKTOP=sway\nexec sway{option}\n",
        mode=0o755,
        why="starts sway",
    )


def i3(machine: Machine, sizes: Sizes) -> Iterator[Step]:
    layout, _, variant = machine.desktop.keyboard.partition(" ")
    yield File(
        "/etc/X11/metal.Xresources",
        f"Xft.dpi: {sizes.dpi}\nXcursor.size: {round(CURSOR_PX * sizes.dpi / 96)}\n"
        f"XTerm*faceName: Monospace\nXTerm*faceSize: {sizes.font_points:g}\n",
        why=told(sizes),
    )
    yield from gtk(sizes)
    yield File(
        "/etc/X11/xorg.conf.d/10-metal-keyboard.conf",
        'Section "InputClass"\n  Identifier "metal keyboard"\n  MatchIsKeyboard "on"\n'
        f'  Option "XkbLayout" "{layout}"\n'
        + (f'  Option "XkbVariant" "{variant}"\n' if variant else "")
        + "EndSection\n",
        why="layout of the keyboard",
    )
    # startx reads no resources for a client of one's own, so they are merged here.
    client = "'xrdb -merge /etc/X11/metal.Xresources; exec i3'"
    yield File(
        SESSION,
        f"#!/bin/sh\nexport XDG_CURRENT_DESKTOP=i3\nexec startx /bin/sh -c {client}\n",
        mode=0o755,
        why="starts i3",
    )
