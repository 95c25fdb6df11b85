"""The tasks: load, gather, plan, show, apply. `fab --list` names them, `fab --help TASK` explains one."""

import webbrowser
from pathlib import Path

from fabric.main import program
from invoke.context import Context
from invoke.tasks import task

from provision import fetch, flow, inspection, jobs, status
from provision import update as updating
from provision import watch as watching
from provision.apply import gather_facts
from provision.console import about, at, dial, here, key_files, load, named, pins, readable
from provision.find import unlock_machine
from provision.machine import known_machines, load_machine, load_stranger, machines_folder
from provision.parallel import Executor, screen
from provision.seed import describe_seed, load_keys, save_seed
from provision.system.inventory import describe_disks
from provision.verify import verify_machine

program.executor_class = Executor  # several machines at once, and one that fails does not stop the others


@task(help=about("wipe", "sweep", "fingerprint", "address"))
def provision(c: Context, wipe: str = "", fingerprint: str = "", address: str = "", sweep: bool = False) -> None:  # fmt: skip
    """Install Arch, the NVIDIA stack and the Python environment; reboot; find the machine again; verify.

    From the live ISO, or on an installed machine to mend what differs. Run it again after any failure.
    """
    with at(c, fingerprint, address) as (host, machine, to):
        end = flow.provision_machine(machine, host, pins(), wipe, to.console, to.ask, sweep=sweep)
        to.console.print(f"[dim]Since it was last dialled: {end.traffic}[/]", highlight=False)
        end.close()


@task(help=about("fingerprint", "address"))
def plan(c: Context, fingerprint: str = "", address: str = "") -> None:
    """Show what provision would do and what would be lost, what drifted, what no machine file names. Changes nothing."""
    with at(c, fingerprint, address) as (host, machine, to):
        flow.show_plan(machine, host, to.console)


@task(help=about("restart", "sweep", "address"))
def update(c: Context, restart: bool = False, sweep: bool = False, address: str = "") -> None:
    """Upgrade all packages; restart if kernel or driver changed; verify. What it was before is kept for rollback.

    Not while a run is at work. Run it again after any failure, and do what it says if it says no.
    """
    with at(c, address=address) as (host, machine, to):
        updating.update_machine(
            machine, host, pins(), to.console, to.ask, sweep=sweep, restart=restart
        ).close()


@task(help=about("sweep", "address"))
def rollback(c: Context, sweep: bool = False, address: str = "") -> None:
    """Go back to before the last update: to its snapshot (btrfs), else to the archive's packages of that day.

    A snapshot takes all but /home, logs and training runs back. What was the system stays in /.snapshots.
    """
    with at(c, address=address) as (host, machine, to):
        updating.rollback_machine(machine, host, pins(), to.console, to.ask, sweep=sweep).close()


@task(positional=["name"], help={
    "name": "of the machine", "resume": "go on after what was done, on the same disks",
    "cold": "boot from the firmware, not from a saved state", "keep": "leave it on at the end, until Ctrl-C",
    "iso": "the official Arch ISO, FILE.sig beside it: booted as it is, nothing typed; packages come from the real mirrors",
})  # fmt: skip
def rehearse(c: Context, name: str, iso: str = "", resume: bool = False, cold: bool = False, keep: bool = False) -> None:  # fmt: skip
    """Provision a virtual machine that has the disks of machines/NAME.toml, as that file says. Needs no -H.

    Change the file, rehearse, then provision the real one. The first rehearsal builds what all need, in minutes.
    """
    from provision.rehearsal import bed, loop  # here: it is a tenth of what every other call of fab takes

    with readable("Stopped, and the virtual machine with it. With --resume the same command goes on."):
        machine = load_machine(here(c, name, "rehearse"), machines_folder())
        how = {"resume": resume, "cold": cold, "keep": keep}
        loop.rehearse_machine(machine, bed.DEFAULT_CACHE, screen().console, **how, iso=iso)


@task(positional=["name"], help={"name": "of the machine", "out": "the image; by default NAME-seed.iso"})
def seed(c: Context, name: str, out: str = "") -> None:
    """Write an image that, on a stick beside the install ISO, makes it known to us and lets us in. Needs no -H."""
    with readable():
        machine = load_stranger(here(c, name, "seed"), machines_folder())
        keys = load_keys(machine, key_files(c.config.connect_kwargs))
        made = save_seed(machine, keys, pins(), Path(out or f"{name}-seed.iso"))
        print(describe_seed(machine, made, has_file=name in known_machines(machines_folder())))


@task(help=about("address"))
def unlock(c: Context, address: str = "") -> None:
    """Wait until a machine runs that was switched on; give it the passphrase of its disk (disk.unlock = "ssh")."""
    with readable():
        machine = load(c, address)
        host = unlock_machine(machine, pins(), key_files(c.connect_kwargs), screen().console)
        screen().say(f"{machine.name} runs its {host.system} system at {host.address}.")


@task(help={"name": "of the machine, where -H gives its address instead", **about("fingerprint", "address")})
def inspect(c: Context, name: str = "", fingerprint: str = "", address: str = "") -> None:
    """Draft machines/NAME.toml from the machine's hardware. Changes nothing there; an existing file stays as it is."""
    with readable():
        machine = inspection.stranger(machines_folder(), named(c), c.port, name, address)
        text = inspection.draft(dial(c, machine, fingerprint), machine, machines_folder())
        screen().console.print(text, highlight=False, markup=False, soft_wrap=True)


@task(help=about("fingerprint", "address"))
def disks(c: Context, fingerprint: str = "", address: str = "") -> None:
    """List the machine's disks with serial, size and what is on them, for disk.serial of the machine file."""
    with at(c, fingerprint, address, need_disk=False) as (host, _, to):
        to.console.print(describe_disks(gather_facts(host)), highlight=False, markup=False)


@task(help=about("quick"))
def verify(c: Context, quick: bool = False) -> None:
    """Check all that training needs: boot, disks, driver, every card, speed, heat. Keeps a page with the history."""
    with at(c) as (host, machine, to):
        folder = Path("checkpoints") / machine.name
        verify_machine(machine, host, folder, to.console, quick=quick, say=to.say)


@task(iterable=["set"], help=about("preset", "data", "name", "set", "detach", "resume", "share", "each"))
def train(
    c: Context, set: list[str], preset: str = "demo", data: str = "", name: str = "", resume: str = "",
    detach: bool = False, share: bool = False, each: bool = False,
) -> None:  # fmt: skip
    """Look whether it can train, send workload and data, start a run that outlives reboots, follow it. -H a,b: one over both."""
    with at(c) as (host, machine, to):
        jobs.train(host, machine, preset=preset, name=name, data=data, settings=set, resume=resume, detach=detach,
                   share=share, beside=() if each else to.beside, reach=to.reach, on_line=to.say, say=to.say)  # fmt: skip


@task
def runs(c: Context) -> None:
    """Show the runs of a machine: state, step, loss, tokens/s, time left, GPU, disk."""
    with at(c) as (host, machine, to):
        to.console.print(status.show_runs(host, machine), highlight=False)


@task(help=about("run"))
def attach(c: Context, run: str = "") -> None:
    """Follow a training run that was started before. Ctrl-C leaves it running."""
    with at(c) as (host, machine, to):
        jobs.attach(host, machine, run, beside=to.beside, reach=to.reach, on_line=to.say, say=to.say)


@task(help=about("run", "lines"))
def logs(c: Context, run: str = "", lines: int = 50) -> None:
    """Print the last lines of a run's log."""
    with at(c) as (host, machine, to):
        jobs.logs(host, machine, run, lines, on_line=to.say)


@task(help=about("run", "now"))
def stop(c: Context, run: str = "", now: bool = False) -> None:
    """End a run: it saves first, and this waits for it."""
    with at(c) as (host, machine, to):
        jobs.stop(host, machine, run, now=now, reach=to.reach, on_line=to.say, say=to.say)


@task(help=about("run", "detach"))
def resume(c: Context, run: str = "", detach: bool = False) -> None:
    """Let a run that ended go on from its latest checkpoint, as it was begun; follow it."""
    with at(c) as (host, machine, to):
        jobs.resume(host, machine, run, detach=detach, beside=to.beside, reach=to.reach, on_line=to.say, say=to.say)  # fmt: skip


@task(help=about("prompt", "run", "tokens"))
def sample(c: Context, prompt: str, run: str = "", tokens: int = 200) -> None:
    """Let a run's best model go on from a prompt, on the machine."""
    with at(c) as (host, machine, to):
        jobs.sample(host, machine, prompt, run, tokens, say=to.say)


@task(help=about("run", "open"))
def report(c: Context, run: str = "", open: bool = False) -> None:
    """Fetch a run's report, made anew: one HTML page; print where it is."""
    with at(c) as (host, machine, to):
        show = webbrowser.open if open else None
        jobs.report(host, machine, Path("checkpoints") / machine.name, run, show=show, say=to.say)


@task(help={"run": "its id", "yes": "ask nothing"})
def remove(c: Context, run: str, yes: bool = False) -> None:
    """Take a run away from the machine, checkpoints and all; what was fetched stays. One at work is refused."""
    with at(c) as (host, machine, to):
        jobs.remove(host, machine, run, yes=yes, ask=to.ask, say=to.say)


@task(help={"run": "its id; by default every run", **about("which", "watch")})
def fetch_checkpoints(c: Context, run: str = "", which: str = "all", watch: bool = False) -> None:
    """Bring home the complete checkpoints, metrics and reports: verified, into checkpoints/NAME."""
    with at(c) as (host, machine, to):
        bring = watching.watch if watch else fetch.fetch_checkpoints
        bring(host, machine, Path("checkpoints") / machine.name, run, which, say=to.say)
