"""The pages for people: what they link, name and show exists, and what is generated in them is fresh."""

import argparse
import importlib.util
import re
import shlex
import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
from fabric.main import program
from invoke.collection import Collection
from invoke.exceptions import ParseError
from invoke.parser import Parser, ParserContext

import fabfile
from provision.machine import PACKAGED_DEFAULTS, load_machine, named_sections, settings
from provision.pages import PAGES, PART, render_page, render_parts
from tests.provision.conftest import KEY
from workload.__main__ import make_parser
from workload.config import list_presets

ROOT = Path(__file__).resolve().parent.parent
TASKS = Collection.from_module(fabfile)
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
FENCE = re.compile(r"^ *```(\w*)\n(.*?)^ *```", re.S | re.M)
SPAN = re.compile(r"(?<!`)`([^`\n]+(?:\n[^`\n]+)?)`(?!`)")


@cache
def markdown() -> tuple[Path, ...]:
    """Every page that git knows, or would."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.md"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()
    return tuple(ROOT / name for name in sorted(set(listed)) if (ROOT / name).is_file())


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


each_page = pytest.mark.parametrize("page", markdown(), ids=name_of)


def commands_in(text: str) -> Iterator[list[str]]:
    """The words of what a page tells to type: in `…`, in blocks of sh, and behind a $ in other blocks."""
    said = []
    for kind, block in FENCE.findall(text):
        lines = block.replace("\\\n", " ").splitlines()
        said += [line.strip() for line in lines] if kind == "sh" else []
        said += [line.strip()[2:] for line in lines if line.strip().startswith("$ ")]
    said += [" ".join(span.split()) for span in SPAN.findall(FENCE.sub("", text))]
    for line in said:
        if re.match(r"([A-Z_]+=\S* )*(fab|make|python -m) ", line.removeprefix("sudo ")):
            for command in re.split(r" && |; | \| ", line):
                words = shlex.split(command, comments=True)
                if words[-1] == "…" and ("=" in words[-2] or not words[-2].startswith("-")):
                    del words[-1]  # and so on; behind an option it is a value
                yield words


def slugs(page: Path) -> set[str]:
    """Anchors of its headings, as forges make them."""
    heads = re.findall(r"^#+ (.+)$", FENCE.sub("", page.read_text()), re.M)
    return {re.sub(r"[^\w -]", "", head.lower()).replace(" ", "-") for head in heads}


@each_page
def test_links_lead_to_something(page: Path) -> None:
    lost = []
    for target in LINK.findall(FENCE.sub("", page.read_text())):
        if re.match(r"[a-z]+:", target):
            continue
        file, _, anchor = target.partition("#")
        found = (page.parent / file).resolve() if file else page
        if not found.exists() or (anchor and anchor not in slugs(found)):
            lost.append(target)
    assert not lost


@each_page
def test_what_is_to_be_typed_exists(page: Path) -> None:
    wrong = [
        f"{shlex.join(words)}: {why}" for words in commands_in(page.read_text()) if (why := wrong_with(words))
    ]
    assert not wrong, "\n".join(wrong)


def wrong_with(words: list[str]) -> str:
    """What is wrong with a command, "" for nothing. Only names of tasks, commands, modules, targets and options count."""
    while words and re.match(r"[A-Z_]+=", words[0]):
        del words[0]
    match words:
        case ["fab", *rest]:
            return wrong_task(rest)
        case ["make", *rest]:
            targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.M)
            return ", ".join(word for word in rest if "=" not in word and word not in (*targets, "-C"))
        case ["python", "-m", "workload", *rest]:
            return wrong_workload(rest)
        case ["python", "-m", module, *rest]:
            return wrong_module(module, rest)
    return ""


def wrong_task(words: list[str]) -> str:
    if {"TASK", "--list", "--help"} & {*words}:
        unknown = [w for w in words if re.fullmatch(r"[a-z][a-z-]*", w) and w not in TASKS.task_names]
        return ", ".join(unknown)
    try:
        parser = Parser(TASKS.to_contexts(), initial=ParserContext(args=program.core_args()))
        parsed = parser.parse_argv(words)
    except ParseError as error:
        # A task may be named without what it is for.
        return "" if "required positional" in str(error) else str(error)
    return "" if len(parsed) > 1 else "no task"


def workload_commands() -> dict[str, argparse.ArgumentParser]:
    return next(action.choices for action in make_parser()._actions if isinstance(action.choices, dict))


def wrong_workload(words: list[str]) -> str:
    commands = workload_commands()
    if not words or words[0] in ("--help", "X", "COMMAND"):
        return ""
    if words[0] not in commands:
        return f"no command {words[0]}"
    known = commands[words[0]]._option_string_actions
    return ", ".join(word for word in words if word.startswith("--") and word.partition("=")[0] not in known)


def wrong_module(module: str, words: list[str]) -> str:
    found = importlib.util.find_spec(module)
    if not found or not found.origin:
        return "no such module"
    source = Path(found.origin)
    if source.name == "__init__.py":
        source = source.with_name("__main__.py")
    if not source.exists():
        return "it cannot be run"
    text = source.read_text()
    options = [word.partition("=")[0] for word in words if word.startswith("--")]
    options += words[:1] if "add_subparsers" in text else []
    return ", ".join(option for option in options if f'"{option}"' not in text)


@pytest.mark.parametrize(
    "command",
    [
        "fab -H gpu1 trian",
        "fab --help trian",
        "fab -H gpu1 train --persist x",
        "make tests",
        "python -m workload smaple",
        "python -m workload train --presets demo",
        "python -m provision.nothing",
        "python -m provision.rehearsal walk",
        "python -m tests.benchmarks.training --often",
    ],
)
def test_a_misspelt_command_is_found(command: str) -> None:
    assert [why for words in commands_in(f"Type `{command}`.") if (why := wrong_with(words))]


def test_generated_parts_are_fresh_and_whole() -> None:
    """Where this fails: `python -m provision.schema` writes them anew."""
    parts = render_parts(PACKAGED_DEFAULTS.read_text())
    for page in PAGES:
        assert page.read_text() == render_page(page.read_text(), parts, page)
    shown = [match["name"] for page in PAGES for match in PART.finditer(page.read_text())]
    assert sorted(shown) == sorted(parts)
    assert {*parts} - {"remedies"} == {f"settings {section}" for section in {*settings(), *named_sections()}}


def test_a_changed_default_changes_the_page() -> None:
    text = (
        PACKAGED_DEFAULTS.read_text()
        .replace("port = 22 ", "port = 2222 ")
        .replace("POSIX extended", "of Perl's kind")
    )
    parts = render_parts(text)
    assert "| `port` | a whole number, 1 to 65535 | `2222` | of sshd" in parts["settings ssh"]
    assert "of Perl's kind" in parts["settings lines"]


MACHINE_FILES = FENCE.findall((ROOT / "machines" / "README.md").read_text())


@pytest.mark.parametrize("text", [block for kind, block in MACHINE_FILES if kind == "toml"])
def test_every_machine_file_that_is_shown_can_be_loaded(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / ".ssh").mkdir()
    for name in ("id_ed25519", "desk", "guest"):
        (tmp_path / ".ssh" / f"{name}.pub").write_text(KEY)
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / "motd").write_text("${name}\n")
    (tmp_path / "files" / "training.lock").write_text("numpy==2.1.0\n")
    (tmp_path / "base.toml").write_text('[disk]\nserial = "S"\n')
    header = "" if "extends =" in text else 'extends = ["base"]\n'
    (tmp_path / "gpu1.toml").write_text(header + text)
    assert load_machine("gpu1", tmp_path).disk.serial


def test_every_task_has_its_section_with_all_its_options() -> None:
    page = (ROOT / "provision" / "README.md").read_text()
    sections = dict(re.findall(r"^### ([a-z-]+)\n(.*?)(?=^#{1,3} |\Z)", page, re.S | re.M))
    assert {*sections} == {*TASKS.task_names}
    for context in TASKS.to_contexts():
        options = {f"--{argument.name.replace('_', '-')}" for argument in context.args.values()}
        options -= {f"--{argument.name}" for argument in context.positional_args}
        told = set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", sections[str(context.name)]))
        assert options <= told, f"{context.name}: {options - told}"


def test_the_training_has_a_section_for_every_command_with_all_its_options() -> None:
    page = (ROOT / "workload" / "README.md").read_text()
    sections = dict(re.findall(r"^### ([a-z]+)\n(.*?)(?=^#{1,3} |\Z)", page, re.S | re.M))
    commands = workload_commands()
    assert {*sections} == {*commands}
    shared = {"--help", "--device", "--dtype", "--threads", "--checkpoint"}
    for name, command in commands.items():
        missing = {option for option in command._option_string_actions if option not in page} - {"-h"}
        assert not missing, f"{name}: {missing}"
        own = {option for option in command._option_string_actions if option.startswith("--")} - shared
        if name != "train":  # whose options are told by the chapters around it, too
            assert own <= set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", sections[name])), name
    for preset in list_presets():
        assert f"| `{preset}` |" in page
