"""How large things are drawn: scale, DPI and font size, from a screen's resolution and physical size. Pure.

What counts is the angle at the eye. A panel that is built in is looked at from nearer than a screen on a desk, so its
pixels look larger: at 96 dots per inch on the desk, and at 120 on the lap, a letter of 11 points is as large as its
designer meant it. Everything else follows by proportion.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from provision.edid import Screen
from provision.facts import Facts
from provision.machine import Machine

DESK_DPI = 96  # what "100 %" means on the desktop: https://www.w3.org/TR/css-values-3/#reference-pixel
LAP_DPI = 120
FONT_POINTS = 11.0
BUILT_IN = ("eDP", "LVDS", "DSI")
LEAST_WIDTH_PX = 1280  # of the desktop, after scaling: dialogs are not made for less


@dataclass(frozen=True)
class Sizes:
    """`scale` of what Wayland shows, in percent; `dpi` and `font_points` for programs under it."""

    scale_percent: int
    dpi: int
    font_points: float


def density(screen: Screen) -> float:
    """How much denser than meant the screen's pixels look: 1.0 on a desk at 96 dots per inch. 1.0 too where it says nothing.

    Less than 1 (a television, a projector) counts as 1: nobody wants smaller letters there.
    """
    if not screen.width_px or not screen.width_mm:
        return 1.0
    reference = LAP_DPI if screen.connector.startswith(BUILT_IN) else DESK_DPI
    return min(max(screen.width_px / screen.width_mm * 25.4 / reference, 1.0), 4.0)


def measure(
    screen: Screen, server: str, *, scale_percent: int = 0, dpi: int = 0, font_points: int = 0
) -> Sizes:
    """Sizes for a screen. `server`: wayland, which scales in quarters, or x11, which only has DPI; what is not 0 is as given.

    Letters of `font_points` are as large on the screen as FONT_POINTS are where the density is 1: what a quarter's
    step of the scale leaves over, the font makes up for.
    """
    looks = density(screen)
    if server == "wayland":
        scale = scale_percent or quarters(looks, screen.width_px)
        dots = dpi or DESK_DPI
    else:
        scale = scale_percent or 100
        dots = dpi or round(DESK_DPI * looks)
    drawn = scale / 100 * dots / DESK_DPI
    points = float(font_points) or max(round(FONT_POINTS * looks / drawn * 2) / 2, 6.0)
    return Sizes(scale, dots, points)


def quarters(looks: float, width_px: int) -> int:
    """The scale in percent, rounded down to a quarter, and less where too little of the desktop would be left."""
    scale = int(looks * 4 + 0.01) * 25
    while scale > 100 and width_px * 100 / scale < LEAST_WIDTH_PX:
        scale -= 25
    return scale


def main_screen(screens: Sequence[Screen], wanted: str = "") -> Screen | None:
    """The screen that sizes are made for: the wanted connector, else the built-in panel, else the one with most pixels.

    A built-in panel, since it is there wherever the laptop is, and the plan should be the same in every place. None
    where no screen says its size.
    """
    known = [screen for screen in screens if screen.width_px and screen.width_mm]
    if wanted:
        return next((screen for screen in known if screen.connector == wanted), None)
    return max(
        known,
        key=lambda screen: (screen.connector.startswith(BUILT_IN), screen.width_px * screen.height_px),
        default=None,
    )


UNKNOWN = Screen("", "", 0, 0, 0.0, 0, 0)


def sizes_of(machine: Machine, facts: Facts) -> tuple[Sizes, bool]:
    """The machine's sizes, and whether they are sure: said by the machine file, or by a screen that is there."""
    wanted = machine.desktop
    server = "x11" if wanted.kind == "i3" else "wayland"
    screen = main_screen(facts.screens, wanted.screen)
    said = wanted.font_size and (wanted.dpi or wanted.scale_percent)
    sizes = measure(
        screen or UNKNOWN,
        server,
        scale_percent=wanted.scale_percent,
        dpi=wanted.dpi,
        font_points=wanted.font_size,
    )
    return sizes, bool(screen or said)


def screen_values(machine: Machine, facts: Facts) -> dict[str, str]:
    """What templates may name of the screen."""
    sizes, _ = sizes_of(machine, facts)
    return {
        "screen.scale": f"{sizes.scale_percent / 100:g}",
        "screen.dpi": str(sizes.dpi),
        "screen.font_size": f"{sizes.font_points:g}",
    }
