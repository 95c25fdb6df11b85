"""Two machines compared, on values."""

import re
import subprocess

import pytest

from tests.faults.compare import COLLECT, EXCLUDED, differences, parse_state

TEXT = """\
@@section packages
base\t1-1
@@section files
/etc/hostname\t644 root:root 98ea
/etc/ssh/ssh_host_ed25519_key\t600 root:root aaaa
/etc/localtime\tl 777 root:root /usr/share/zoneinfo/UTC
@@section units
sshd.service\tenabled
@@section end
"""


def test_the_same_is_no_difference() -> None:
    assert differences(parse_state(TEXT), parse_state(TEXT)) == []


@pytest.mark.parametrize(
    ("line", "instead", "said"),
    [
        ("base\t1-1\n", "", "packages: base: 1-1 → not there"),
        (
            "644 root:root 98ea",
            "600 root:root 98ea",
            "/etc/hostname: 644 root:root 98ea → 600 root:root 98ea",
        ),
        ("644 root:root 98ea", "644 ml:root 98ea", "→ 644 ml:root 98ea"),
        ("98ea", "99ea", "→ 644 root:root 99ea"),
        ("zoneinfo/UTC", "zoneinfo/CET", "zoneinfo/CET"),
        ("sshd.service\tenabled", "sshd.service\tdisabled", "units: sshd.service: enabled → disabled"),
        ("base\t1-1", "base\t1-1\nleft\t2", "packages: left: not there → 2"),
    ],
)
def test_whatever_differs_is_named(line: str, instead: str, said: str) -> None:
    changed = TEXT.replace(line, instead)
    assert changed != TEXT
    (difference,) = differences(parse_state(TEXT), parse_state(changed))
    assert said in str(difference)


def test_a_whole_section_that_is_missing_is_a_difference() -> None:
    assert len(differences(parse_state(TEXT), parse_state("@@section end\n"))) == 4  # not the host key


def test_what_is_excluded_may_differ_there_and_nowhere_else() -> None:
    assert differences(parse_state(TEXT), parse_state(TEXT.replace("aaaa", "bbbb"))) == []
    moved = TEXT.replace("/etc/ssh/ssh_host", "/home/ml/etc/ssh/ssh_host")
    assert differences(parse_state(moved), parse_state(moved.replace("aaaa", "bbbb")))


def test_an_answer_that_is_cut_short_is_no_state() -> None:
    with pytest.raises(ValueError, match="cut short"):
        parse_state(TEXT.partition("@@section end")[0])


def test_the_script_is_bash_and_names_every_excluded_section() -> None:
    assert subprocess.run(["bash", "-n", "-c", COLLECT], check=False).returncode == 0
    for section, pattern, why in EXCLUDED:
        assert f"section {section};" in COLLECT or f"section {section}\n" in COLLECT
        assert re.compile(pattern)
        assert why
