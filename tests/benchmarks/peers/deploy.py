"""The 60 resources for pyinfra."""

from pathlib import Path

from pyinfra import host
from pyinfra.facts.files import File
from pyinfra.operations import files, server

BASE = "/run/bench"
TEMPLATE = str(Path(__file__).with_name("app.conf.j2"))

for index in range(20):
    files.template(
        name=f"file {index}",
        src=TEMPLATE,
        dest=f"{BASE}/etc/app-{index}.conf",
        user="root",
        group="root",
        mode="644",
        index=index,
        workers=4,
    )
for index in range(10):
    files.directory(
        name=f"directory {index}", path=f"{BASE}/folders/{index}", user="root", group="root", mode="750"
    )
for index in range(10):
    files.line(
        name=f"line {index}",
        path=f"{BASE}/lines.conf",
        line=f"^key{index}=.*$",
        replace=f"key{index}=new{index}",
    )
for index in range(10):
    files.link(name=f"link {index}", path=f"{BASE}/links/{index}", target=f"{BASE}/etc/app-{index}.conf")
for index in range(10):
    if not host.get_fact(File, path=f"{BASE}/done/{index}"):
        server.shell(name=f"command {index}", commands=[f"touch {BASE}/done/{index}"])
