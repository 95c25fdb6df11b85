"""Wi-Fi, by NetworkManager: it then has the whole network, wired too, since two managers would argue about routes."""

import hashlib
import re
import uuid
from base64 import b64encode
from collections.abc import Iterator
from shlex import quote

from provision.facts import Facts
from provision.machine import Machine
from provision.own import WifiWanted
from provision.steps import STATE, File, Packages, Script, Step, digest_of, secret_file

FOLDER = "/etc/NetworkManager/system-connections"
RECORDS = f"{STATE}/wifi"
RELOAD = "[[ $root ]] || ! systemctl --quiet is-active NetworkManager.service || nmcli connection reload"
# https://networkmanager.dev/docs/api/latest/settings-802-11-wireless-security.html
KEY_MANAGEMENT = {"wpa2": "wpa-psk", "wpa3": "sae"}


def wireless(machine: Machine, facts: Facts) -> Iterator[Step]:
    """NetworkManager and its connections, on the ISO already: the first boot may have no cable."""
    if not machine.wifi:
        return
    yield Packages("networkmanager", "wireless-regdb", why="Wi-Fi")
    yield File(
        "/etc/NetworkManager/conf.d/10-metal.conf",
        "[main]\ndns=systemd-resolved\n\n[connection]\nconnection.mdns=2\nipv4.dhcp-client-id=mac\n",
        why="names by systemd-resolved; wired addresses asked for by MAC, so that they stay the same over installations",
        then=RELOAD,
    )
    for ssid, wanted in machine.wifi.items():
        yield connection(ssid, wanted)
    yield manager()


def slug(ssid: str) -> str:
    """A file name that tells the network and is like no other's."""
    return f"{re.sub('[^A-Za-z0-9]+', '-', ssid)}-{hashlib.sha256(ssid.encode()).hexdigest()[:8]}"


def keyfile(ssid: str, wanted: WifiWanted) -> str:
    """A connection of NetworkManager without its passphrase, for which the last line is left."""
    lines = [
        "[connection]",
        f"id={ssid}",
        f"uuid={uuid.uuid5(uuid.NAMESPACE_DNS, f'{ssid}.wifi.metal-to-model')}",
        "type=wifi",
        f"autoconnect-priority={wanted.priority}",
        "",
        "[wifi]",
        "mode=infrastructure",
        f"ssid={ssid}",
        *(["hidden=true"] if wanted.hidden else []),
        "",
        "[ipv4]",
        "method=auto",
        "",
        "[ipv6]",
        "method=auto",
    ]
    if wanted.passphrase:
        lines += ["", "[wifi-security]", f"key-mgmt={KEY_MANAGEMENT[wanted.security]}"]
    return "\n".join(lines) + "\n"


def connection(ssid: str, wanted: WifiWanted) -> Step:
    """One network. The probe needs no passphrase: a record tells whether the file is the one that was written for it."""
    path, content = f"{FOLDER}/{slug(ssid)}.nmconnection", keyfile(ssid, wanted)
    if not wanted.passphrase:
        return File(path, content, mode=0o600, why=f"the network {ssid}", then=RELOAD)
    record, staged = f"{RECORDS}/{slug(ssid)}", f"{FOLDER}/.{slug(ssid)}.metal-new"  # it reads no dot files
    digest = f'{{ echo {digest_of(wanted.passphrase)}; cat "$root"{quote(path)}; }} | sha256sum'
    return Script(
        f"file {path}",
        why=f"the network {ssid}",
        probe=f"at stat --format '%F, mode %a, %U:%G' -- {quote(path)}\nat sed 's/^psk=.*/psk=***/' {quote(path)}\n"
        f'[[ $({digest}) == "$(at cat {quote(record)})" ]] && echo "(as it was written)"',
        expect=f"regular file, mode 600, root:root\n{content}psk=***\n(as it was written)",
        script=f"""umask 077
psk=$(<{secret_file(wanted.passphrase)})
((${{#psk}} >= 8 && ${{#psk}} <= 64)) || {{ echo "a passphrase of Wi-Fi has 8 to 63 characters; this one has ${{#psk}}"; exit 1; }}
psk=${{psk//\\\\/\\\\\\\\}}
psk=${{psk// /\\\\s}}
mkdir -p "$root"{FOLDER} "$root"{RECORDS}
chmod 700 "$root"{FOLDER}
{{ base64 -d <<< '{b64encode(content.encode()).decode()}'; printf 'psk=%s\\n' "$psk"; }} > "$root"{quote(staged)}
mv -fT "$root"{quote(staged)} "$root"{quote(path)}
{digest} > "$root"{quote(record)}""",
        then=RELOAD,
        secret=wanted.passphrase,
    )


def manager() -> Step:
    """NetworkManager in networkd's place. Where that brings no network within a minute, networkd has it back."""
    off = 'systemctl --root="${root:-/}" disable systemd-networkd.service'
    return Script(
        "network by NetworkManager",
        why="it knows Wi-Fi; networkd has nothing to do any more",
        probe="""systemctl --root="${root:-/}" is-enabled NetworkManager.service || true
state=$(systemctl --root="${root:-/}" is-enabled systemd-networkd.service) || true
[[ $state == enabled ]] && echo "networkd too"
if [[ $root ]]; then echo active; else systemctl is-active NetworkManager.service || true; fi""",
        expect="enabled\nactive",
        script=f"""systemctl --root="${{root:-/}}" enable NetworkManager.service
{off}
if [[ ! $root ]]; then
  systemctl daemon-reload
  systemctl stop 'systemd-networkd*.socket' systemd-networkd.service
  if ! {{ systemctl start NetworkManager.service && nm-online --quiet --timeout 60; }}; then
    echo "NetworkManager brought no network within a minute; networkd has it again"
    systemctl disable --now NetworkManager.service || true
    systemctl enable --now systemd-networkd.service
    exit 1
  fi
fi""",
    )
