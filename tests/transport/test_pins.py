"""The file of pinned keys, and the verdict on a presented one."""

import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from provision.errors import ProvisionError
from provision.pins import fingerprint_of, judge, load_pins, parse_fingerprint, parse_key, pin, unknown_key
from tests.sshd import keygen


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("keys")
    kinds = ["ed25519", "ed25519", "rsa", "ecdsa"]
    paths = [keygen(folder / str(number), kind) for number, kind in enumerate(kinds)]
    return [parse_key(path.with_suffix(".pub").read_text()) for path in paths]


def test_openssh_finds_and_fingerprints_what_we_pin(tmp_path: Path, keys: list[str]) -> None:
    pins = tmp_path / "known_hosts"
    pin(pins, "gpu1", keys[0] + " a comment")
    pin(pins, "gpu1.live", keys[2])
    found = subprocess.run(
        ["ssh-keygen", "-l", "-F", "gpu1", "-f", pins], capture_output=True, text=True, check=True
    )
    assert fingerprint_of(keys[0]) in found.stdout
    assert load_pins(pins) == {"gpu1": keys[0], "gpu1.live": keys[2]}


def test_a_pin_replaces_its_own_line_only(tmp_path: Path, keys: list[str]) -> None:
    pins = tmp_path / "known_hosts"
    pins.write_text("# ours\n")
    pin(pins, "gpu1", keys[0])
    pin(pins, "gpu10", keys[1])
    pin(pins, "gpu1", keys[3])
    assert pins.read_text() == f"# ours\ngpu10 {keys[1]}\ngpu1 {keys[3]}\n"
    assert [path.name for path in tmp_path.iterdir()] == ["known_hosts"]


def test_machines_pinned_at_once_all_stay(tmp_path: Path, keys: list[str]) -> None:
    pins = tmp_path / "known_hosts"
    names = [f"gpu{number}" for number in range(40)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda name: pin(pins, name, keys[0]), names))
    assert sorted(load_pins(pins)) == sorted(names)


@pytest.mark.parametrize("alias", ["", "two words", "a,b", "*", "!gpu1", "@revoked", "|1|hash", "-x", "a\nb"])
def test_an_alias_cannot_be_a_pattern(tmp_path: Path, keys: list[str], alias: str) -> None:
    with pytest.raises(ProvisionError, match="cannot name a host key"):
        pin(tmp_path / "known_hosts", alias, keys[0])


def test_an_unreadable_line_is_named(tmp_path: Path, keys: list[str]) -> None:
    pins = tmp_path / "known_hosts"
    pins.write_text(f"gpu1 {keys[0]}\ngpu2 ssh-ed25519 AAAAB3NzaC1yc2E=\n")
    with pytest.raises(ProvisionError, match=r"known_hosts:2: not a public key line"):
        load_pins(pins)


def test_fingerprints_as_people_paste_them(keys: list[str]) -> None:
    wanted = fingerprint_of(keys[0])
    bare = wanted.removeprefix("SHA256:")
    for text in (wanted, bare, bare + "=", f"  {wanted}\n", f"256 {wanted} root@archiso (ED25519)"):
        assert parse_fingerprint(text) == wanted
    for text in ("", "SHA256:", "MD5:16:27:ac:a5:76:28:2d:36:63:1b:56:4d:eb:df:a6:48", bare[:-1], bare + "x"):
        with pytest.raises(ProvisionError, match="not a SHA256 fingerprint"):
            parse_fingerprint(text)


def test_whose_key_it_is(keys: list[str]) -> None:
    known = {"gpu1": keys[0], "gpu1.live": keys[1], "gpu2": keys[2]}
    assert judge(known, "gpu1", keys[0], "") == "installed"
    assert judge(known, "gpu1", keys[1], "") == "live"
    assert judge(known, "gpu1", keys[2], "") is None, "the key of another machine vouches for nothing"
    assert judge(known, "gpu1", keys[2], fingerprint_of(keys[2])) == "live"
    assert judge(known, "gpu1", keys[2], fingerprint_of(keys[3])) is None
    assert judge(known, "gpu1", keys[0], fingerprint_of(keys[3])) == "installed", (
        "an old --fingerprint is no harm"
    )


def test_the_error_shows_all_fingerprints_and_what_to_type(keys: list[str]) -> None:
    known = {"gpu1": keys[0], "gpu1.live": keys[1]}
    error = unknown_key(known, "gpu1", "gpu1 (10.0.0.7)", keys[2], fingerprint_of(keys[3]))
    for key in keys:
        assert fingerprint_of(key) in str(error)
    assert "ssh_host_rsa_key.pub" in error.hint
    assert f"fab -H gpu1 provision --fingerprint {fingerprint_of(keys[2])}" in error.hint
