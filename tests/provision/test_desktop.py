"""Scale, DPI and font size from a screen, and the desktop as planned."""

import os
import tomllib
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from provision.edid import Screen
from provision.errors import ProvisionError
from provision.facts import Facts
from provision.machine import Machine, load_machine
from provision.steps import Step
from provision.system import system
from provision.system.scale import FONT_POINTS, Sizes, density, main_screen, measure
from tests.provision.conftest import KEY, machine_folder
from tests.provision.test_own import added, wish
from tests.provision.test_system import GOLDEN, NOW, installed, render


def screen(connector: str, width_px: int, height_px: int, width_mm: int) -> Screen:
    return Screen(connector, "", width_px, height_px, 60.0, width_mm, round(width_mm * height_px / width_px))


# (screen, what sway gets, what i3 gets); what a person would choose in the settings of a desktop.
KNOWN = {
    "24 inch, 1080p": (screen("HDMI-A-1", 1920, 1080, 531), Sizes(100, 96, 11.0), Sizes(100, 96, 11.0)),
    "27 inch, 1440p": (screen("DP-1", 2560, 1440, 597), Sizes(100, 96, 12.5), Sizes(100, 109, 11.0)),
    "27 inch, 2160p": (screen("DP-1", 3840, 2160, 597), Sizes(150, 96, 12.5), Sizes(100, 163, 11.0)),
    "32 inch, 2160p": (screen("DP-1", 3840, 2160, 697), Sizes(125, 96, 13.0), Sizes(100, 140, 11.0)),
    "laptop of 15.6 inch, 1080p": (screen("eDP-1", 1920, 1080, 344), Sizes(100, 96, 13.0), Sizes(100, 113, 11.0)),
    "laptop of 14 inch, 1080p": (screen("eDP-1", 1920, 1080, 309), Sizes(125, 96, 11.5), Sizes(100, 126, 11.0)),
    "laptop of 13 inch, 1600p": (screen("eDP-1", 2560, 1600, 286), Sizes(175, 96, 12.0), Sizes(100, 182, 11.0)),
    "television of 55 inch": (screen("HDMI-A-1", 3840, 2160, 1210), Sizes(100, 96, 11.0), Sizes(100, 96, 11.0)),
    "says nothing": (Screen("VGA-1", "", 0, 0, 0, 0, 0), Sizes(100, 96, 11.0), Sizes(100, 96, 11.0)),
}  # fmt: skip


@pytest.mark.parametrize("name", KNOWN)
def test_sizes_of_known_screens(name: str) -> None:
    seen, wayland, x11 = KNOWN[name]
    assert measure(seen, "wayland") == wayland
    assert measure(seen, "x11") == x11


SCREENS = st.builds(
    screen,
    st.sampled_from(["eDP-1", "DP-3", "HDMI-A-1"]),
    st.integers(640, 10240),
    st.integers(480, 5000),
    st.integers(60, 2000),
)


@given(SCREENS, st.sampled_from(["wayland", "x11"]))
def test_letters_are_as_large_as_meant_on_every_screen(seen: Screen, server: str) -> None:
    """In pixels of the panel: points, by DPI, by scale; half a point and half a dot are lost in rounding."""
    sizes = measure(seen, server)
    drawn_px = sizes.font_points * sizes.dpi / 72 * sizes.scale_percent / 100
    meant_px = FONT_POINTS * 96 / 72 * density(seen)
    assert abs(drawn_px - meant_px) <= meant_px * 0.03 + 0.5
    assert sizes.scale_percent % 25 == 0
    assert sizes.scale_percent >= 100
    assert sizes.scale_percent == 100 or seen.width_px * 100 / sizes.scale_percent >= 1280


@given(SCREENS, SCREENS, st.sampled_from(["wayland", "x11"]))
def test_a_denser_screen_never_gets_less(one: Screen, other: Screen, server: str) -> None:
    less, more = sorted(
        (replace(one, connector="DP-1", width_px=4096), replace(other, connector="DP-1", width_px=4096)),
        key=density,
    )
    assert measure(less, server).scale_percent <= measure(more, server).scale_percent
    assert measure(less, server).dpi <= measure(more, server).dpi


def test_what_is_said_is_kept_and_the_rest_follows() -> None:
    seen = KNOWN["27 inch, 2160p"][0]
    assert measure(seen, "wayland", scale_percent=200) == Sizes(200, 96, 9.5)
    assert measure(seen, "wayland", font_points=20) == Sizes(150, 96, 20.0)
    assert measure(seen, "x11", dpi=192) == Sizes(100, 192, 9.5)


def test_the_screen_that_counts() -> None:
    lap, desk = KNOWN["laptop of 14 inch, 1080p"][0], KNOWN["27 inch, 2160p"][0]
    small, mute = KNOWN["24 inch, 1080p"][0], KNOWN["says nothing"][0]
    assert main_screen([mute, desk, lap]) == lap
    assert main_screen([small, desk, mute]) == desk
    assert main_screen([small, desk], "HDMI-A-1") == small
    assert main_screen([small, desk], "DP-7") is None
    assert main_screen([mute]) is None


DESKTOPS = {
    "sway": '[desktop]\nkind = "sway"\nautologin = true\nkeyboard = "de nodeadkeys"\n',
    "i3": '[desktop]\nkind = "i3"\n',
}


def wanting(folder: Path, text: str) -> Machine:
    folder.mkdir(exist_ok=True)
    user = f'[disk]\nserial = "S4EWNX0R"\n[user]\nauthorized_keys = ["{KEY}"]\npassword = "env:P"\n'
    return load_machine("gpu1", machine_folder(folder, user + text))


@pytest.mark.parametrize("kind", DESKTOPS)
def test_golden_desktops(tmp_path: Path, live: Facts, kind: str) -> None:
    """Nothing of it is done on the ISO."""
    plain, machine = wanting(tmp_path / "plain", ""), wanting(tmp_path / kind, DESKTOPS[kind])
    assert added(machine, plain, live, "live") == []
    rendered = render([step for step in added(machine, plain, live, "installed") if not step.packages])
    golden = GOLDEN / f"{kind}.txt"
    if "UPDATE_GOLDEN" in os.environ:  # then read the difference, line by line
        golden.write_text(rendered)
    assert rendered == golden.read_text()


def steps_of(machine: Machine, facts: Facts) -> dict[str, Step]:
    return {step.name: step for step in system(machine, facts, NOW)}


def test_packages_of_a_desktop_come_in_the_one_transaction(tmp_path: Path, live: Facts) -> None:
    for kind, package in (("sway", "foot"), ("i3", "xorg-server")):
        machine = wanting(tmp_path / kind, DESKTOPS[kind])
        (packages,) = [step for step in system(machine, installed(machine, live), NOW) if step.packages]
        assert {package, "greetd", "greetd-tuigreet"} <= set(packages.packages)


def test_sizes_stay_while_no_screen_is_seen(tmp_path: Path, live: Facts) -> None:
    machine = wanting(tmp_path / "sway", DESKTOPS["sway"])
    facts = installed(machine, live)
    name = "file /etc/sway/config.d/10-metal.conf"
    assert "scale 1.5" in steps_of(machine, facts)[name].expect
    unplugged = steps_of(machine, replace(facts, screens=()))
    assert unplugged[name].expect == "there"
    assert (
        unplugged["file /etc/greetd/config.toml"] == steps_of(machine, facts)["file /etc/greetd/config.toml"]
    )
    said = wanting(tmp_path / "said", DESKTOPS["sway"] + "scale_percent = 125\nfont_size = 14\n")
    assert "scale 1.25\nfont pango:monospace 14" in steps_of(said, replace(facts, screens=()))[name].expect


def test_greetd_reads_what_is_written_and_logs_in_only_who_wants_it(tmp_path: Path, live: Facts) -> None:
    for kind, autologin in (("sway", True), ("i3", False)):
        machine = wanting(tmp_path / kind, DESKTOPS[kind])
        step = steps_of(machine, installed(machine, live))["file /etc/greetd/config.toml"]
        said = tomllib.loads(step.expect.partition("\n")[2])
        assert said.get("initial_session") == (
            {"command": "/usr/local/bin/metal-desktop", "user": "ml"} if autologin else None
        )
        assert said["default_session"]["user"] == "greeter"


def test_templates_may_name_the_screen(tmp_path: Path, live: Facts) -> None:
    text = '[files."/etc/a"]\ntemplate = true\ntext = "${screen.scale} ${screen.dpi} ${screen.font_size}"\n'
    machine = wish(tmp_path / "own", text)
    assert steps_of(machine, installed(machine, live))["file /etc/a"].expect.endswith("\n1.5 96 12.5")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('kind = "kde"', ":6: desktop.kind is 'kde'; expected none, sway or i3"),
        ('kind = "sway"', ":6: desktop.kind: nobody could log in: ml has no password"),
        ("autologin = true", ":6: desktop.autologin: there is no desktop"),
        (
            'kind = "i3"\nautologin = true\nscale_percent = 150',
            ":8: desktop.scale_percent: X11 knows no scale",
        ),
        ('kind = "sway"\nautologin = true\ndpi = 150', ":8: desktop.dpi: Wayland knows no DPI"),
    ],
)
def test_desktops_that_cannot_be(tmp_path: Path, text: str, expected: str) -> None:
    with pytest.raises(ProvisionError) as caught:
        wish(tmp_path / "own", f"[desktop]\n{text}\n")
    assert expected in caught.value.message
