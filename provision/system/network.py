"""Wired network, name resolution, sshd."""

from collections.abc import Iterator
from shlex import quote

from provision.facts import Facts
from provision.machine import Machine
from provision.steps import File, Link, Script, Step, Unit
from provision.system.wireless import wireless

HOST_KEY = "/etc/ssh/ssh_host_ed25519_key"


def network(machine: Machine, facts: Facts) -> Iterator[Step]:
    """One manager: networkd where the network is wired, NetworkManager where there is Wi-Fi."""
    if not machine.wifi:
        yield from wired(machine)
    yield File(
        "/etc/issue.d/10-address.issue", "address: \\4\n\n", why="the console shows where the machine answers"
    )
    if machine.wifi:
        yield from wireless(machine, facts)
    else:
        yield Unit("systemd-networkd.service", why="network")
    yield File(
        "/etc/systemd/resolved.conf.d/10-mdns.conf",
        "[Resolve]\nMulticastDNS=yes\n",
        why=f"answers to {machine.system.hostname}.local, whatever its address",
        then="[[ $root ]] || systemctl try-restart systemd-resolved.service",
    )
    yield Unit("systemd-resolved.service", why="name resolution")
    yield Link(
        "/etc/resolv.conf", "/run/systemd/resolve/stub-resolv.conf", why="programs ask systemd-resolved"
    )


def wired(machine: Machine) -> Iterator[Step]:
    yield File(
        "/etc/systemd/network/20-wired.network",
        # By MAC: networkd's default client id comes from the machine-id, so every new install would get a new address.
        f"[Match]\nName={machine.network.match}\n\n[Network]\nDHCP=yes\nMulticastDNS=yes\n\n[DHCPv4]\nClientIdentifier=mac\n",
        why="an address by DHCP, asked for by MAC so that it stays the same over installations",
        then="[[ $root ]] || networkctl reload",
    )
    yield File(
        "/etc/systemd/system/systemd-networkd-wait-online.service.d/10-any.conf",
        "[Service]\nExecStart=\nExecStart=/usr/lib/systemd/systemd-networkd-wait-online --any\n",
        why="one cable is enough: by default it waits for every port, in vain",
        then="[[ $root ]] || systemctl daemon-reload",
    )


def sshd(machine: Machine, facts: Facts) -> Iterator[Step]:
    """Keys only, no root; our own host key, so that the machine is known again after the reboot."""
    # Arch has no separate privilege separation folder; Debian's sshd, which the rehearsal runs, asks for one.
    check = "in_target bash -c 'mkdir -p /run/sshd && /usr/sbin/sshd -t'"
    yield Script(
        "ssh host key",
        why="made here, on the machine, and pinned before the reboot",
        probe=f"at test -s {HOST_KEY} && at test -s {HOST_KEY}.pub && echo yes",
        # Not a second time: the probe may not have seen it, on a disk that was locked then.
        script=f"if at test -s {HOST_KEY} && at test -s {HOST_KEY}.pub; then exit 0; fi\nat rm -f {HOST_KEY} {HOST_KEY}.pub\nin_target ssh-keygen -q -t ed25519 -N '' -C {quote(machine.name)} -f {HOST_KEY}",
    )
    people = [machine.user.name, *(name for name, other in machine.users.items() if other.authorized_keys)]
    yield File(
        "/etc/ssh/sshd_config.d/10-metal.conf",  # sshd takes the first value it meets: before 99-archlinux.conf
        f"HostKey {HOST_KEY}\nPermitRootLogin no\nPasswordAuthentication no\nKbdInteractiveAuthentication no\n"
        f"AllowUsers {' '.join(people)}\n",
        why="keys only, no root, one host key",
        then=f"{check}\n[[ $root ]] || systemctl try-reload-or-restart sshd.service",
    )
    yield Unit("sshd.service", why="the way in")
