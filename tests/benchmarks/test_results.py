"""The parts of RESULTS.md, and the script by hand, on values."""

import subprocess
from pathlib import Path

from provision.steps import Plan, Planned, Script, render_apply
from tests.benchmarks.overhead import by_hand
from tests.benchmarks.results import PATH, split_parts, write_part


def test_a_part_is_replaced_and_the_others_stay(tmp_path: Path) -> None:
    path = tmp_path / "RESULTS.md"
    write_part("# one\n\n## seconds\n1\n", path)
    write_part("# two\n\n2\n", path)
    write_part("# one\n\n## seconds\n3\n", path)
    assert path.read_text() == "# one\n\n## seconds\n3\n\n# two\n\n2\n"


def test_the_file_is_made_of_parts() -> None:
    assert "\n".join(split_parts(PATH.read_text()).values()) == PATH.read_text()


def test_by_hand_does_what_the_steps_do(tmp_path: Path) -> None:
    """The same commands: the script by hand and the one that is applied leave the same words behind."""
    seen = tmp_path / "seen"
    steps = [
        Script(
            name,
            why="",
            probe="",
            script=f"echo {name} >> {seen}",
            then=f"echo then >> {seen}" if then else "",
        )
        for name, then in (("a", True), ("b", False), ("c", True))
    ]
    plan = Plan("", tuple(Planned(step, "") for step in steps), 0)
    subprocess.run(["bash", "-c", by_hand(plan).replace("root=/mnt", "root=")], check=True)
    hand = seen.read_text()
    seen.unlink()
    subprocess.run(
        ["bash", "-euo", "pipefail", "-c", render_apply(plan, str(tmp_path))], check=True, capture_output=True
    )
    assert hand == seen.read_text() == "a\nb\nc\nthen\n"
