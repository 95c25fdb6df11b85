"""EDID blocks of real screens, and such as no screen should send."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from provision.edid import Screen, parse_screen
from tests.provision.conftest import DELL_U2723QE

DELL_U3011 = bytes.fromhex("""
00 ff ff ff ff ff ff 00 10 ac 65 40 4c 58 4e 41 33 16 01 04 b5 40 28 78 3a 8d 85 ad 4f 35 b1 25
0e 50 54 a5 4b 00 71 4f 81 00 81 80 a9 40 d1 00 d1 40 01 01 01 01 e2 68 00 a0 a0 40 2e 60 30 20
36 00 81 91 21 00 00 1a 00 00 00 ff 00 50 48 35 4e 59 32 43 49 41 4e 58 4c 0a 00 00 00 fc 00 44
45 4c 4c 20 55 33 30 31 31 0a 20 20 00 00 00 fd 00 31 56 1d 71 1c 00 0a 20 20 20 20 20 20 01 56
""")
DELL_1708FP = bytes.fromhex("""
00 ff ff ff ff ff ff 00 10 ac 24 40 5a 39 41 41 1f 11 01 03 80 22 1b 78 ee ae a5 a6 54 4c 99 26
14 50 54 a5 4b 00 71 4f 81 80 01 01 01 01 01 01 01 01 01 01 01 01 30 2a 00 98 51 00 2a 40 30 70
13 00 52 0e 11 00 00 1e 00 00 00 ff 00 50 4d 30 36 31 37 38 32 41 41 39 5a 0a 00 00 00 fc 00 44
45 4c 4c 20 31 37 30 38 46 50 0a 20 00 00 00 fd 00 38 4c 1e 51 0e 00 0a 20 20 20 20 20 20 00 36
""")


@pytest.mark.parametrize(
    ("edid", "name", "pixels", "mm", "dots_per_inch"),
    [
        (DELL_U2723QE, "DELL U2723QE", (3840, 2160), (597, 336), 163),
        (DELL_U3011, "DELL U3011", (2560, 1600), (641, 401), 101),
        (DELL_1708FP, "DELL 1708FP", (1280, 1024), (338, 270), 96),
    ],
)
def test_real_screens(
    edid: bytes, name: str, pixels: tuple[int, int], mm: tuple[int, int], dots_per_inch: int
) -> None:
    screen = parse_screen("card1-DP-2", edid + bytes(128))  # extensions follow
    assert (screen.connector, screen.name) == ("DP-2", name)
    assert (screen.width_px, screen.height_px) == pixels
    assert (screen.width_mm, screen.height_mm) == mm
    assert round(screen.refresh_hz) == 60
    assert screen.dots_per_inch == dots_per_inch


def with_bytes(changes: dict[int, int]) -> bytes:
    """The first screen's block with some bytes changed and its checksum mended."""
    block = bytearray(DELL_U2723QE)
    for at, value in changes.items():
        block[at] = value
    block[127] = -sum(block[:127]) % 256
    return bytes(block)


def size(edid: bytes) -> tuple[int, int]:
    screen = parse_screen("card0-DP-1", edid)
    return screen.width_mm, screen.height_mm


def test_the_size_is_not_believed_where_it_contradicts_itself() -> None:
    assert size(with_bytes({21: 59, 22: 33})) == (597, 336)  # rounded
    assert size(with_bytes({66: 16, 67: 9, 68: 0})) == (600, 340)  # an aspect ratio in place of millimetres
    assert size(with_bytes({66: 60, 67: 34, 68: 0})) == (600, 340)  # centimetres
    assert size(with_bytes({22: 0})) == (597, 336)  # 1.4: byte 21 is an aspect ratio then
    assert size(with_bytes({21: 0, 22: 0, 66: 0, 67: 0, 68: 0})) == (0, 0)  # a projector


def test_interlaced_and_missing_timings() -> None:
    interlaced = parse_screen("card0-DP-1", with_bytes({71: DELL_U2723QE[71] | 0x80}))
    assert (interlaced.height_px, round(interlaced.refresh_hz)) == (4320, 30)
    none = parse_screen("card0-DP-1", with_bytes({54: 0, 55: 0}))
    assert (none.width_px, none.width_mm, none.name) == (0, 600, "DELL U2723QE")


def test_damaged_blocks_say_nothing() -> None:
    nothing = Screen("HDMI-A-1", "", 0, 0, 0.0, 0, 0)
    for edid in (b"", DELL_U3011[:127], DELL_U3011[:-1] + b"\0", b"\1" + DELL_U3011[1:-1] + b"\x55"):
        assert parse_screen("card0-HDMI-A-1", edid) == nothing
    assert nothing.dots_per_inch == 0


@given(st.dictionaries(st.integers(8, 126), st.integers(0, 255), max_size=30))
def test_any_block_is_read_without_fear(changes: dict[int, int]) -> None:
    screen = parse_screen("card0-DP-1", with_bytes(changes))
    assert screen.width_px < 4096
    assert screen.name.isprintable()
