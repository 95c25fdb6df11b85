"""Before a run: one exec that sees whether the machine can train, and what a person does where it cannot."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath

from provision.errors import ProvisionError
from provision.facts import PROBE, Facts, parse_facts
from provision.host import Host
from provision.machine import Machine
from provision.runs import Folder
from provision.system.python import ENVIRONMENT, python
from provision.transfer import human
from provision.units import AT_WORK, variables
from workload.config import TOKENIZERS, Config, ModelConfig

DEADLINE_S = 120
CARDS = "index,name,memory.used,memory.total"  # of nvidia-smi, which counts in MiB

# `active` says what each unit that is at work was asked to do, with its own id taken out. A run of root's making
# does not exist: the folders are the user's.
RUNS = r"""
home=$(getent passwd "$user" | cut -d: -f6)
folder=$home/$name
echo "folder $folder"
for id in "$folder"/runs/*/id; do
  run=${id%/id}
  [ -e "$id" ] || continue
  echo "last ${run##*/}"
  [ ! -e "$run/hosts" ] || echo "hosts ${run##*/} $(head -c 2000 "$run/hosts")"
  [ ! -e "$run/status" ] || continue
  at_work "metal-run-${run##*/}" || continue
  sum=$(sed "s/${run##*/}/RUN/g" <"$run/script" | sha256sum)
  echo "active ${run##*/} ${sum%% *}"
done
"""
CHECK = r"""
echo "environment $(readlink "$environment" || true)"
[ ! -x "$environment/bin/python" ] || echo python
[ ! -e "$folder/source/$source" ] || echo source
case "$data" in '') ;; /*) [ ! -e "$data" ] || echo data;; *) [ ! -e "$folder/$data" ] || echo data;; esac
at=$folder; [ -e "$at" ] || at=$home
echo "free $(df --block-size=1 --output=avail "$at" | tail -n 1)"
if seen=$(timeout 20 nvidia-smi "--query-gpu=$cards" --format=csv,noheader,nounits 2>&1); then
  while read -r line; do echo "card $line"; done <<<"$seen"
  timeout 20 nvidia-smi --query-compute-apps=pid,used_memory,process_name --format=csv,noheader,nounits |
    while read -r pid rest; do
      pid=${pid%,}
      [ -z "$pid" ] || echo "busy $pid, $(ps -o user= -p "$pid" || echo '?'), $rest"
    done || true
else
  echo "driver ${seen//$'\n'/ }"
fi
"""


@dataclass(frozen=True)
class Runs:
    """The runs of a machine."""

    folder: Folder
    active: dict[str, str]  # run id → hash of its command, see `jobs.command_id`
    last: str  # the run that was begun last (ids sort by time), "" where there is none
    hosts: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # of those over several machines


@dataclass(frozen=True)
class Seen:
    """What one exec found before a run."""

    facts: Facts
    runs: Runs
    environment: str  # what the link of the environment leads to, "" where there is none
    has_python: bool
    has_source: bool
    has_data: bool
    free_bytes: int
    cards: tuple[str, ...]  # as nvidia-smi names them; none where it fails
    driver: str  # what nvidia-smi said instead
    busy: tuple[str, ...]  # processes that compute on a GPU


def parse_runs(text: str) -> Runs:
    folder, active, last = "", {}, ""
    hosts: dict[str, tuple[str, ...]] = {}
    for line in text.splitlines():
        match line.split(" ", 2):
            case ["folder", *path]:
                folder = " ".join(path)
            case ["last", run]:
                last = run
            case ["hosts", run, names]:
                hosts[run] = tuple(names.split())
            case ["active", run, command]:
                active[run] = command
    return Runs(Folder(PurePosixPath(folder)), active, last, hosts)


def parse_seen(text: str) -> Seen:
    probe, _, said = text.partition("\n@end\n")
    lines = [line.partition(" ") for line in said.splitlines()]
    of = {word: rest.strip() for word, _, rest in lines}
    return Seen(
        facts=parse_facts(f"{probe}\n@end\n"),
        runs=parse_runs(said),
        environment=of.get("environment", ""),
        has_python="python" in of,
        has_source="source" in of,
        has_data="data" in of,
        free_bytes=int(of["free"]),
        cards=tuple(rest for word, _, rest in lines if word == "card"),
        driver=of.get("driver", ""),
        busy=tuple(rest for word, _, rest in lines if word == "busy"),
    )


def demand_installed(host: Host) -> None:
    if host.system != "installed":
        raise ProvisionError(
            f"{host.name} is on the install ISO; nothing can be trained there.",
            f"fab -H {host.name} provision",
        )


def look_for_runs(host: Host, machine: Machine) -> Runs:
    """One exec."""
    demand_installed(host)
    return parse_runs(
        host.look(variables(user=machine.user.name, name=machine.train.folder) + AT_WORK + RUNS).stdout
    )


def look(host: Host, machine: Machine, source: str, data: str) -> Seen:
    """One exec. `data`: a path below the folder, or an absolute one, that the run will read; "" for none."""
    demand_installed(host)
    values = variables(
        user=machine.user.name,
        name=machine.train.folder,
        environment=ENVIRONMENT,
        source=source,
        data=data,
        cards=CARDS,
    )
    return parse_seen(host.look(PROBE + values + AT_WORK + RUNS + CHECK, deadline_s=DEADLINE_S).stdout)


def wanted_environment(machine: Machine, facts: Facts) -> str:
    """Where the environment's link leads once the machine is as its file says: the planner's own word."""
    return next(step.expect for step in python(machine, facts) if step.name == "python environment")


def demand_ready(machine: Machine, seen: Seen, need_bytes: int, *, share: bool) -> None:
    """Raise ProvisionError, with the next command, where a run would fail or disturb another."""
    name = machine.name
    provision = f"fab -H {name} provision"
    if seen.facts.system != "installed":
        raise ProvisionError(f"{name} is not an installation of ours.", provision)
    if not seen.has_python:
        raise ProvisionError(
            f"{name} has no Python environment: {ENVIRONMENT}/bin/python is missing.", provision
        )
    if seen.environment != wanted_environment(machine, seen.facts):
        raise ProvisionError(
            f"The Python environment of {name} is not the one that its machine file asks for.",
            f"fab -H {name} plan shows the difference; {provision} makes it.",
        )
    if wants_gpu(machine, seen) and not seen.cards:
        why = "; ".join([f"nvidia-smi: {seen.driver[:300]}", *seen.facts.reboot])
        raise ProvisionError(
            f"{name} has an NVIDIA card and its driver does not answer: {why}.",
            f'{provision} mends and restarts it. To train on the processor: gpu.driver = "none" in its file.',
        )
    if seen.busy and not share:
        raise ProvisionError(
            f"The GPU of {name} is in use (process, user, MiB, program):\n" + indent(seen.busy),
            "End it there, or add --share to train beside it.",
        )
    if seen.free_bytes < need_bytes:
        raise ProvisionError(
            f"The run's checkpoints{' and data' * (not seen.has_data)} need {human(need_bytes)}, and "
            f"{seen.runs.folder.path} on {name} has room for {human(seen.free_bytes)}.",
            f"fab -H {name} runs shows what lies there; fab -H {name} remove --run ID takes a run away. "
            "Or keep fewer checkpoints: --set train.keep=1",
        )


def wants_gpu(machine: Machine, seen: Seen) -> bool:
    return machine.gpu.driver != "none" and bool(seen.facts.gpus)


def describe_device(machine: Machine, seen: Seen) -> str:
    """What a person wants to know before a long run."""
    if not wants_gpu(machine, seen):
        return f"the processor ({seen.facts.cpu_model or 'of an unknown model'}); no GPU is used"
    names = [card.split(", ")[1] for card in seen.cards]
    return f"{len(names)} x {names[0]}" if len(set(names)) == 1 else ", ".join(names)


def count_parameters(model: ModelConfig, tokenizer: str) -> int:
    """Of GPT-2: embeddings, 12·C² + 13·C a layer (Radford et al. 2019; biases and norms are the 13·C), last norm."""
    C, V = model.n_embd, model.vocab_size or TOKENIZERS.get(tokenizer, max(TOKENIZERS.values()))
    head = 0 if model.tied else V * C
    return V * C + model.n_ctx * C + model.n_layer * (12 * C * C + 13 * C) + 2 * C + head


def checkpoint_bytes(config: Config) -> int:
    """Weights and AdamW's two moments in fp32."""
    return 12 * count_parameters(config.model, config.data.tokenizer)


def runs_bytes(config: Config) -> int:
    """What a run's checkpoints will take: those kept, the best, the one being written, and what is kept for good."""
    wanted = config.train
    for_good = wanted.steps // wanted.keep_every if wanted.keep_every else 0
    return checkpoint_bytes(config) * (wanted.keep + 2 + for_good)


def indent(lines: Sequence[str]) -> str:
    return "\n".join(f"  {line}" for line in lines)
