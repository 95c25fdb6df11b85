"""What may come in from the network: ssh always, what the machine file opens, answers; nothing else."""

from collections.abc import Iterator
from shlex import join

from provision.facts import Facts
from provision.kinds import NFT, SSHD, CheckedFile
from provision.machine import Machine
from provision.meet import RUN_PORTS
from provision.steps import Packages, Script, Step, Unit

RULES = "/etc/nftables.conf"
SSH_PORT = 22


def open_ports(machine: Machine) -> tuple[str, ...]:
    """TCP ports and ranges. Where sshd is dialled at another port than it listens on (a router's), both are open."""
    return tuple(dict.fromkeys((str(SSH_PORT), str(machine.ssh.port), *machine.firewall.tcp)))


def rules(machine: Machine) -> str:
    """A table of our own, and not `flush ruleset`: others (containers, libvirt) have theirs beside it."""
    udp = f"    udp dport {{ {', '.join(machine.firewall.udp)} }} accept\n" if machine.firewall.udp else ""
    joined = ", ".join(machine.firewall.peers)
    peers = f"    ip saddr {{ {joined} }} tcp dport {{ {', '.join(RUN_PORTS)} }} accept\n" if joined else ""
    return f"""#!/usr/bin/nft -f
table inet metal
delete table inet metal
table inet metal {{
  chain input {{
    type filter hook input priority filter; policy drop;
    ct state established,related accept
    ct state invalid drop
    iifname "lo" accept
    meta l4proto {{ 1, 58 }} accept comment "ICMP, ICMPv6"
    udp sport 67 udp dport 68 accept comment "DHCP"
    ip6 saddr fe80::/10 udp dport 546 accept comment "DHCPv6"
    udp dport 5353 accept comment "mDNS: its own name"
    tcp dport {{ {", ".join(open_ports(machine))} }} accept
{udp}{peers}  }}
}}
"""


def firewall(machine: Machine, facts: Facts) -> Iterator[Step]:
    """On the installed system, where it can be seen on which ports sshd really listens."""
    if facts.system != "installed" or not machine.firewall.enabled:
        return
    yield Packages("nftables", why="firewall")
    yield CheckedFile(
        RULES,
        rules(machine),
        check=f"{NFT}\n{sshd_is_open(open_ports(machine))}",
        user=machine.user.name,
        why=f"open: TCP {' '.join(open_ports(machine))}"
        + (f", UDP {' '.join(machine.firewall.udp)}" if machine.firewall.udp else "")
        + (
            f", to {' '.join(machine.firewall.peers)} TCP {' '.join(RUN_PORTS)}"
            if machine.firewall.peers
            else ""
        ),
        # Not reloaded: its reload flushes what others made.
        then=f"if systemctl --quiet is-active nftables.service; then nft --file {RULES}; fi",
    )
    yield Unit("nftables.service", why="firewall, from before the network is up")
    yield Script(
        "firewall in force",
        why="whoever flushes the rules by hand leaves everything open",
        probe="nft list chain inet metal input > /dev/null && echo yes",
        script=f"nft --file {RULES}",
    )


def sshd_is_open(ports: tuple[str, ...]) -> str:
    """Bash: fail where sshd listens on a port that is not open."""
    return f"""mkdir -p /run/sshd
listens=$(/usr/sbin/sshd -T | sed -n 's/^port //p')
[[ $listens ]] || {{ echo "sshd does not say on which port it listens"; exit 1; }}
for port in $listens; do
  open=
  for span in {join(ports)}; do
    if ((port >= ${{span%-*}} && port <= ${{span#*-}})); then open=yes; fi
  done
  [[ $open ]] || {{ echo "sshd listens on port $port, which would be shut: add it to firewall.tcp"; exit 1; }}
done"""


def hardening(machine: Machine, facts: Facts) -> Iterator[Step]:
    """More than keys only, which stands anyway. MaxAuthTries stays: an agent with many keys would be locked out."""
    if facts.system == "installed" and machine.sshd.hardened:
        yield CheckedFile(
            "/etc/ssh/sshd_config.d/20-metal-hardened.conf",
            "AuthenticationMethods publickey\nAllowAgentForwarding no\nX11Forwarding no\nPermitTunnel no\n"
            "LoginGraceTime 60\nMaxStartups 10:30:60\n",
            check=SSHD,
            user=machine.user.name,
            why="sshd.hardened of the machine file",
            then="systemctl try-reload-or-restart sshd.service",
        )
