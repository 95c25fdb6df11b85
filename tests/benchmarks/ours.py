"""The 60 resources as Steps: connect, probe, apply what is pending, probe again. A process of its own, as the peers are.

python -m tests.benchmarks.ours MACHINES_FOLDER
"""

import sys
from pathlib import Path

from provision.apply import demand_empty
from provision.host import Host, connect
from provision.machine import load_machine
from provision.steps import (
    Directory,
    File,
    Link,
    Plan,
    Script,
    Step,
    make_plan,
    parse_probes,
    render_apply,
    render_probes,
)

BASE = "/run/bench"


def app(index: int, workers: int = 4) -> str:
    """What peers/app.conf.j2 becomes."""
    return f"""# app {index}: written by a template
[service]
name = app-{index}
listen = 127.0.0.1:{8000 + index}
workers = {workers}
timeout_s = 30
log = /var/log/app-{index}.log
[limits]
memory_mib = {256 * workers}
files = 4096
"""


def resources() -> list[Step]:
    why = "the benchmark wants it"
    lines = f"{BASE}/lines.conf"
    return [
        *(File(f"{BASE}/etc/app-{index}.conf", app(index), why=why) for index in range(20)),
        *(Directory(f"{BASE}/folders/{index}", mode=0o750, why=why) for index in range(10)),
        *(
            Script(
                f"line {index}",
                why=why,
                probe=f"at grep -qxF key{index}=new{index} {lines} && echo yes",
                script=f"at sed -i 's/^key{index}=.*$/key{index}=new{index}/' {lines}",
            )
            for index in range(10)
        ),
        *(Link(f"{BASE}/links/{index}", f"{BASE}/etc/app-{index}.conf", why=why) for index in range(10)),
        *(
            Script(
                f"command {index}",
                why=why,
                probe=f"at test -e {BASE}/done/{index} && echo yes",
                script=f"at touch {BASE}/done/{index}",
            )
            for index in range(10)
        ),
    ]


def look(host: Host, steps: list[Step]) -> Plan:
    return make_plan("resources", steps, parse_probes(steps, host.run(render_probes(steps, "")).stdout))


def main(folder: Path) -> None:
    steps = resources()
    with connect(load_machine("box", folder), folder / "known_hosts") as host:
        plan = look(host, steps)
        if plan:
            host.run(render_apply(plan, ""), deadline_s=300)
            demand_empty(look(host, steps))
        print(f"{len(plan.pending)} changed, {plan.done} done; {host.traffic}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
