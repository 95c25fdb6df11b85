"""python -m provision.rehearsal: the commands."""

import argparse
import json
import os
import shlex
import sys
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from provision.errors import ProvisionError
from provision.machine import load_machine, machines_folder
from provision.rehearsal import loop, medium, tools, wheels
from provision.rehearsal.bed import DEFAULT_CACHE, NAME, Bed, build_root_stages
from provision.rehearsal.cache import Cache
from provision.rehearsal.likeness import StandIns


def main(argv: list[str]) -> int:
    """Run one command; 0, 1 after one readable error, 130 after Ctrl-C."""
    arguments = make_parser().parse_args(argv)
    console = Console()
    try:
        arguments.command(arguments, console)
    except ProvisionError as error:
        console.print(f"\n[red]error:[/] {escape(str(error))}", soft_wrap=True, highlight=False)
        return 1
    except KeyboardInterrupt:
        words = [word for word in argv if word != "--resume"]
        on = f" Go on: python -m provision.rehearsal {shlex.join(words)} --resume" if "run" in argv else ""
        console.print(f"\nStopped.{on}", soft_wrap=True, highlight=False)
        return 130
    return 0


def run(arguments: argparse.Namespace, console: Console) -> None:
    how = {"resume": arguments.resume, "cold": arguments.cold, "keep": arguments.keep}
    if arguments.machine != NAME:
        machine = load_machine(arguments.machine, machines_folder())
        loop.rehearse_machine(machine, arguments.cache, console, **how, iso=arguments.iso)
    elif arguments.iso:
        raise ProvisionError(
            f"--iso is for a machine of yours: that of machines/{NAME}.toml has its packages from the rehearsal's repository.",
            f"python -m provision.rehearsal run --machine NAME --iso {shlex.quote(arguments.iso)}",
        )
    else:
        loop.rehearse(arguments.cache, console, **how)


def setup(arguments: argparse.Namespace, console: Console) -> None:
    installed = tools.install_missing(arguments.cache / "logs" / "setup.log")
    console.print(f"installed {', '.join(installed)}" if installed else "all programs are there")


def build(arguments: argparse.Namespace, console: Console) -> None:
    tools.install_missing(arguments.cache / "logs" / "bed.log")
    with Bed(arguments.cache, on_build=lambda name: console.print(f"building {name}")) as bed:
        bed.snapshot(bed.machine().hardware)
        console.print(f"ready in {bed.folder}")


def root_stages(arguments: argparse.Namespace, console: Console) -> None:
    """What `Bed` calls through sudo for a person who is not root."""
    log = arguments.cache / "logs" / "bed-root.log"
    cache = Cache(arguments.cache.resolve(), lambda name: console.print(f"  building {name}"))
    uv = cache.stage("uv", [wheels.UV], lambda stage: wheels.build_uv(stage, log))
    keys = medium.load_keys(cache.folder / "keys", log)
    stand_ins = StandIns(**{key: tuple(names) for key, names in json.loads(arguments.stand_ins).items()})
    build_root_stages(cache, keys, wheels.wheel(uv, "uv"), log, stand_ins)


def ssh(arguments: argparse.Namespace, console: Console) -> None:
    """Replaces this process by OpenSSH: to the installed system where it is pinned, else to the live one."""
    name = arguments.machine
    place = NAME if name == NAME else loop.of_person(name, official=arguments.iso)
    folder = arguments.cache.resolve() / "vm" / place / "machines"
    if not folder.exists():
        command = "python -m provision.rehearsal run" if name == NAME else f"fab rehearse {name}"
        command += " --iso FILE" if arguments.iso else ""
        raise ProvisionError(f"{name} is not being rehearsed.", f"{command} --keep")
    machine = load_machine(name, folder)
    pins = folder / "known_hosts"
    installed = pins.exists() and any(line.startswith(f"{name} ") for line in pins.read_text().splitlines())
    user, alias = (machine.user.name, name) if installed else ("root", f"{name}.live")
    options = [f"-oUserKnownHostsFile={pins}", f"-oHostKeyAlias={alias}", "-oStrictHostKeyChecking=yes"]
    identity = ["-i", os.path.expanduser(machine.ssh.identity)] if machine.ssh.identity else []
    argv = ["ssh", "-F", "none", *identity, "-p", str(machine.ssh.port), *options]
    os.execvp("ssh", [*argv, f"{user}@{machine.ssh.address}", *arguments.words])


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m provision.rehearsal", description=__doc__)
    commands = parser.add_subparsers(required=True)

    def add(name: str, function: object, text: str) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=text, description=text)
        command.add_argument(
            "--cache", type=Path, default=DEFAULT_CACHE, help="where parts and machines are kept"
        )
        command.set_defaults(command=function)
        return command

    whole = add(
        "run",
        run,
        "Install, reboot, train on and fetch from a virtual machine, by the project's own commands.",
    )
    whole.add_argument("--machine", default=NAME, help="one of yours: that is provisioned, and no more")
    whole.add_argument(
        "--iso",
        default="",
        metavar="FILE",
        help="boot the official ISO in place of the stand-in medium, FILE.sig beside it: packages come from real mirrors",
    )
    whole.add_argument(
        "--resume", action="store_true", help="go on after the last phase that was done, on the same disk"
    )
    whole.add_argument("--cold", action="store_true", help="boot from the firmware, not from a saved state")
    whole.add_argument("--keep", action="store_true", help="leave the machine on at the end, until Ctrl-C")
    add("setup", setup, "Install the programs that a rehearsal and the tests need.")
    add("build", build, "Build all that a rehearsal needs, and stop before it.")
    add(
        "root-stages", root_stages, "Build the stages that need root. Called by the others through sudo."
    ).add_argument("--stand-ins", default="{}", help="as JSON")
    shell = add("ssh", ssh, "Log in to the machine that `run --keep` left on.")
    shell.add_argument("--machine", default=NAME, help="which, where it is one of yours")
    shell.add_argument("--iso", action="store_true", help="that which was booted from the official ISO")
    shell.add_argument("words", nargs="*", help="command")
    return parser


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
