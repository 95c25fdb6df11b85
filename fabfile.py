"""The tasks: load, gather, plan, show, apply. `fab --list` names them, `fab --help TASK` explains one."""

from pathlib import Path

from fabric.main import program
from invoke.context import Context
from invoke.tasks import task

from provision import fetch, flow, inspection, jobs
from provision.apply import gather_facts
from provision.console import dial, here, key_files, load, named, pins, readable
from provision.find import unlock_machine
from provision.machine import known_machines, load_stranger, machines_folder
from provision.parallel import Executor, screen
from provision.seed import describe_seed, load_keys, save_seed
from provision.system.inventory import describe_disks

program.executor_class = Executor  # several machines at once, and one that fails does not stop the others
WIPE = "serial of the disk that may lose all it holds; of several machines: S1,S2, each for its own disk only"
REACH = {
    "fingerprint": "of the ISO's host key, SHA256:…, as `ssh-keygen -lf /etc/ssh/ssh_host_ed25519_key.pub` shows it on its console",
    "address": "where the machine answers now; kept in machines/NAME.local.toml",
}


SWEEP = "after the reboot, look for it by its host key in its whole subnet too, without asking anybody"


@task(help={"wipe": WIPE, "sweep": SWEEP, **REACH})
def provision(
    c: Context, wipe: str = "", fingerprint: str = "", address: str = "", sweep: bool = False
) -> None:
    """Install Arch, the NVIDIA stack and the Python environment; reboot; find the machine again; verify.

    From the live ISO, or on an installed machine to mend what differs. Run it again after any failure.
    """
    with readable():
        machine = load(c, address)
        host, to = dial(c, machine, fingerprint), screen()
        with flow.provision_machine(machine, host, pins(), wipe, to.console, to.ask, sweep=sweep) as host:
            to.console.print(f"[dim]Since it was last dialled: {host.traffic}[/]", highlight=False)


@task(help=REACH)
def plan(c: Context, fingerprint: str = "", address: str = "") -> None:
    """Show what provision would do, and what it would destroy. Changes nothing."""
    with readable():
        machine = load(c, address)
        flow.show_plan(machine, dial(c, machine, fingerprint), screen().console)


@task(positional=["name"], help={"name": "of the machine", "out": "the image; by default NAME-seed.iso"})
def seed(c: Context, name: str, out: str = "") -> None:
    """Write an image that, on a stick beside the install ISO, makes it known to us and lets us in. Needs no -H."""
    with readable():
        machine = load_stranger(here(c, name), machines_folder())
        keys = load_keys(machine, key_files(c.config.connect_kwargs))
        made = save_seed(machine, keys, pins(), Path(out or f"{name}-seed.iso"))
        print(describe_seed(machine, made, has_file=name in known_machines(machines_folder())))


@task(help={"address": REACH["address"]})
def unlock(c: Context, address: str = "") -> None:
    """Wait until a machine runs that was switched on; give it the passphrase of its disk (disk.unlock = "ssh")."""
    with readable():
        machine = load(c, address)
        host = unlock_machine(machine, pins(), key_files(c.connect_kwargs), screen().console)
        screen().say(f"{machine.name} runs its {host.system} system at {host.address}.")


@task(help={"name": "of the machine, where -H gives its address instead", **REACH})
def inspect(c: Context, name: str = "", fingerprint: str = "", address: str = "") -> None:
    """Draft machines/NAME.toml from what the machine has, of which nothing is changed. An existing file stays as it is."""
    with readable():
        machine = inspection.stranger(machines_folder(), named(c), c.port, name, address)
        text = inspection.draft(dial(c, machine, fingerprint), machine, machines_folder())
        screen().console.print(text, highlight=False, markup=False, soft_wrap=True)


@task(help=REACH)
def disks(c: Context, fingerprint: str = "", address: str = "") -> None:
    """List the machine's disks with serial, size and what is on them, for disk.serial of the machine file."""
    with readable():
        machine = load(c, address, need_disk=False)
        text = describe_disks(gather_facts(dial(c, machine, fingerprint)))
        screen().console.print(text, highlight=False, markup=False)


TRAIN = {
    "preset": "one of workload/presets",
    "set": "key=value of the configuration; may be repeated",
    "detach": "start it, do not follow it",
    "resume": "id of a run that ended: it goes on from its latest checkpoint",
}


@task(iterable=["set"], help=TRAIN)
def train(c: Context, set: list[str], preset: str = "demo", detach: bool = False, resume: str = "") -> None:
    """Send the workload, start a training run as a systemd unit, follow it. Ctrl-C leaves it running."""
    with readable():
        machine = load(c)
        say, host = screen().say, dial(c, machine)
        jobs.train(
            host, machine, preset=preset, settings=set, detach=detach, resume=resume, on_line=say, say=say
        )


@task(help={"run": "its id; by default the one that runs, or ran last"})
def attach(c: Context, run: str = "") -> None:
    """Follow a training run that was started before. Ctrl-C leaves it running."""
    with readable():
        machine = load(c)
        jobs.attach(dial(c, machine), machine, run, on_line=screen().say, say=screen().say)


@task(help={"run": "its id; by default every run"})
def fetch_checkpoints(c: Context, run: str = "") -> None:
    """Bring home the complete checkpoints, metrics and reports: verified, into checkpoints/NAME."""
    with readable():
        machine = load(c)
        home = Path("checkpoints") / machine.name
        fetch.fetch_checkpoints(dial(c, machine), machine, home, run, say=screen().say)
