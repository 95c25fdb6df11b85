"""What a screen says of itself: the base block of its EDID, as the kernel shows it in /sys/class/drm/*/edid.

VESA Enhanced Extended Display Identification Data Standard (E-EDID), release A: section 3, 128 bytes.
"""

import re
from dataclasses import dataclass

HEADER = bytes.fromhex("00ffffffffffff00")
BLOCK_BYTES = 128
DESCRIPTORS = (54, 72, 90, 108)  # 18 bytes each; the first is the preferred timing
NAME_TAG = 0xFC


@dataclass(frozen=True)
class Screen:
    """A connected screen; what it does not say is "" or 0."""

    connector: str  # as the kernel calls it, such as DP-1
    name: str
    width_px: int
    height_px: int
    refresh_hz: float
    width_mm: int
    height_mm: int

    @property
    def dots_per_inch(self) -> int:
        return round(self.width_px / self.width_mm * 25.4) if self.width_mm else 0


def parse_screen(connector: str, edid: bytes) -> Screen:
    """The screen on a connector (`card0-DP-1`); a block that is cut, damaged or not EDID says nothing."""
    name = re.sub(r"^card\d+-", "", connector)
    block = edid[:BLOCK_BYTES]
    if len(block) < BLOCK_BYTES or not block.startswith(HEADER) or sum(block) % 256:
        return Screen(name, "", 0, 0, 0.0, 0, 0)
    timing = block[DESCRIPTORS[0] : DESCRIPTORS[0] + 18]
    width_px, height_px, refresh_hz = parse_timing(timing)
    width_mm, height_mm = parse_size(block, timing)
    return Screen(name, parse_name(block), width_px, height_px, refresh_hz, width_mm, height_mm)


def parse_timing(timing: bytes) -> tuple[int, int, float]:
    """Width and height in pixels and pictures a second, of a detailed timing descriptor (section 3.10.2)."""
    clock_hz = int.from_bytes(timing[:2], "little") * 10_000
    if not clock_hz:  # another kind of descriptor
        return 0, 0, 0.0
    width, blank_width = timing[2] | (timing[4] & 0xF0) << 4, timing[3] | (timing[4] & 0x0F) << 8
    height, blank_height = timing[5] | (timing[7] & 0xF0) << 4, timing[6] | (timing[7] & 0x0F) << 8
    total = (width + blank_width) * (height + blank_height)
    refresh_hz = clock_hz / total if total else 0.0
    # Interlaced: lines and blanks are those of a field, two of which make a picture.
    return (width, height * 2, refresh_hz / 2) if timing[17] & 0x80 else (width, height, refresh_hz)


def parse_size(block: bytes, timing: bytes) -> tuple[int, int]:
    """Width and height in mm: those of the timing, where the screen's size in cm does not contradict them.

    Some screens write an aspect ratio, or centimetres, where the timing's millimetres belong.
    """
    exact = timing[12] | (timing[14] & 0xF0) << 4, timing[13] | (timing[14] & 0x0F) << 8
    rough = block[21] * 10, block[22] * 10
    if not all(rough):  # a projector; or, since 1.4, an aspect ratio in one of the two
        rough = (0, 0)
    has_timing = any(timing[:2])
    if (
        has_timing
        and all(exact)
        and (not any(rough) or all(abs(a - b) <= 10 for a, b in zip(exact, rough, strict=True)))
    ):
        return exact
    return rough


def parse_name(block: bytes) -> str:
    """The display product name (section 3.10.3.4), without what no console should be sent."""
    for at in DESCRIPTORS:
        descriptor = block[at : at + 18]
        if descriptor[:3] == b"\0\0\0" and descriptor[3] == NAME_TAG:
            text = descriptor[5:].partition(b"\n")[0].decode("ascii", errors="replace").strip()
            return "".join(character if character.isprintable() else "?" for character in text)
    return ""
