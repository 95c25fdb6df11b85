"""The table of remedies: the nine faults that everybody with such machines meets, and every other that is known."""

import re

import pytest

from provision.remedies import every_check, render_remedies, rows

# As programs say them, and what must be told then.
MET = [
    ("NVRM: nouveau was loaded; loaded: nouveau.", "mkinitcpio --allpresets"),
    ("Failed to initialize NVML: Driver/library version mismatch", "Reboot it"),
    ("no nvidia module for 6.18.44-1-lts.", "Reboot it"),
    ("is supported through the NVIDIA 580.xx Legacy drivers", "legacy_commit"),
    ("this module does not include the required GPU", "fab plan names the right one"),
    ("No devices were found", "fab plan names the right one"),
    ("dkms: nvidia/580.178.04, 6.19.0: added; make.log", "headers"),
    ("RuntimeError: CUDA unknown error", "nvidia-modprobe -u -c 0"),
    ("CUDA error: no kernel image is available for execution", "chooses by the cards"),
    ("Failed to insert module 'nvidia': Key was rejected by service", "Secure Boot"),
]


@pytest.mark.parametrize(("said", "remedy"), MET)
def test_what_is_met_most_has_its_remedy(said: str, remedy: str) -> None:
    told = [text for check in every_check() for pattern, text in check.causes if re.search(pattern, said)]
    assert any(remedy in text for text in told), told


def test_the_table_has_every_check_and_every_cause() -> None:
    found = every_check()
    table = render_remedies(found)
    assert len({check.name for check in found}) == len(found)
    listed = list(rows(found))
    assert len(listed) == sum(len(check.causes) + 1 for check in found)
    assert table.count("\n") == len(listed) + 2
    for line in table.splitlines():
        assert len(re.split(r"(?<!\\)\|", line)) == 5, line
