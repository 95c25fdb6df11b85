"""The published JSON Schema is the generated one, and says what the loader checks."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from provision.machine import PACKAGED_DEFAULTS, settings
from provision.schema import DIRECTIVE, SCHEMA, comment_of, read_comments, render_schema


def published() -> dict[str, Any]:
    schema: dict[str, Any] = json.loads(SCHEMA.read_text())["properties"]
    return schema


def test_the_published_schema_is_the_generated_one() -> None:
    """Where this fails: `python -m provision.schema` writes it anew."""
    assert SCHEMA.read_text() == render_schema(PACKAGED_DEFAULTS.read_text())


def test_every_setting_has_a_meaning_in_the_defaults() -> None:
    meanings = read_comments(PACKAGED_DEFAULTS.read_text())
    assert {keys for keys in meanings if keys[0] in settings()} == {
        (section, key) for section, known in settings().items() for key in known
    }
    assert PACKAGED_DEFAULTS.read_text().startswith(f"{DIRECTIVE}\n")


def test_a_changed_setting_changes_the_schema() -> None:
    text = PACKAGED_DEFAULTS.read_text()
    changed = text.replace("port = 22 ", "port = 2222 ").replace("of the text console", "of the keyboard")
    schema = json.loads(render_schema(changed))["properties"]
    assert schema["ssh"]["properties"]["port"]["default"] == 2222
    assert schema["system"]["properties"]["keymap"]["description"] == "of the keyboard"


def test_rules_reach_the_schema() -> None:
    schema = published()
    assert schema["gpu"]["properties"]["driver"]["enum"] == ["auto", "open", "none"]
    assert schema["ssh"]["properties"]["port"] == {
        "description": "of sshd, on the ISO and on the installed system",
        "type": "integer",
        "minimum": 1,
        "maximum": 65535,
        "default": 22,
    }
    assert "oneOf" in schema["extends"]
    assert schema["extends"]["description"]
    password = re.compile(schema["user"]["properties"]["password"]["pattern"])
    assert password.search("env:PASSWORD")
    assert not password.search("hunter2")


@pytest.mark.parametrize(
    ("line", "comment"),
    [
        ('a = "#1"   # one', "one"),
        ("a = 'it''", ""),
        ("a = 1", ""),
        ('a = ["#", "\\"#"] # two # three', "two # three"),
    ],
)
def test_comments_behind_values(line: str, comment: str) -> None:
    assert comment_of(line) == comment


@pytest.mark.parametrize("path", sorted(PACKAGED_DEFAULTS.parent.glob("*.toml")), ids=lambda path: path.name)
def test_every_default_keeps_its_own_rule(path: Path) -> None:
    import tomllib

    for section, table in tomllib.loads(path.read_text()).items():
        for key, value in table.items():
            rule = published()[section]["properties"][key]
            for item in value if isinstance(value, list) else [value]:
                wanted = rule["items"] if isinstance(value, list) else rule
                assert re.search(wanted.get("pattern", ""), str(item))
                assert item in wanted.get("enum", [item])
