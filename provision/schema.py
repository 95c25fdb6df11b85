"""The JSON Schema of machine files, for editors: `python -m provision.schema` writes machines/schema.json.

Names, types and rules come from the dataclasses of `provision.machine`, meanings and defaults from
machines/defaults.toml. A file finds it by its first line, `#:schema ./schema.json`, which Taplo and the editors'
TOML extensions built on it read.
"""

import json
import re
import tomllib
from pathlib import Path
from typing import Any

from provision.layers import EXTENDS, locate_keys
from provision.machine import PACKAGED_DEFAULTS, Between, Rule, Setting, settings
from provision.pins import ALIAS

SCHEMA = PACKAGED_DEFAULTS.with_name("schema.json")
DIRECTIVE = "#:schema ./schema.json"
CHOICE = re.compile(r"[a-z0-9]+(\|[a-z0-9]+)*")


def render_schema(defaults: str) -> str:
    """The schema as JSON text; `defaults` is the text of machines/defaults.toml."""
    values, meanings = tomllib.loads(defaults), read_comments(defaults)
    names = {"type": "string", "pattern": whole(ALIAS.pattern)}
    extends: dict[str, Any] = {"oneOf": [names, {"type": "array", "items": names, "uniqueItems": True}]}
    described = re.search(rf"^# {EXTENDS} = .*?\]\s*# (.+)$", defaults, re.MULTILINE)
    if described:
        extends["description"] = described[1]
    properties: dict[str, Any] = {EXTENDS: extends}
    for section, known in settings().items():
        properties[section] = {
            "type": "object",
            "additionalProperties": False,
            "properties": {
                key: describe(setting, values[section][key], meanings.get((section, key), ""))
                for key, setting in known.items()
            },
        }
    schema = {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "title": "A machine of metal-to-model",
        "type": "object",
        "additionalProperties": False,
        "properties": properties,
    }
    return json.dumps(schema, indent=2, ensure_ascii=False) + "\n"


def describe(setting: Setting, default: object, meaning: str) -> dict[str, Any]:
    """One setting as a schema."""
    text = {"description": meaning} if meaning else {}
    if setting.kind is bool:
        return {**text, "type": "boolean", "default": default}
    if isinstance(setting.rule, Between):
        span = {"minimum": setting.rule.least, "maximum": setting.rule.greatest}
        return {**text, "type": "integer", **span, "default": default}
    rule = pattern_of(setting.rule) if isinstance(setting.rule, Rule) else {}
    if setting.kind == tuple[str, ...]:
        return {**text, "type": "array", "items": {"type": "string", **rule}, "default": default}
    return {**text, "type": "string", **rule, "default": default}


def pattern_of(rule: Rule) -> dict[str, Any]:
    """A list of choices where the rule is one, which editors complete; else a pattern."""
    if CHOICE.fullmatch(rule.pattern):
        return {"enum": rule.pattern.split("|")}
    return {"pattern": whole(rule.pattern)}


def whole(pattern: str) -> str:
    return f"^(?:{pattern})$"  # a schema's pattern may match anywhere, a Rule's matches the whole


def read_comments(text: str) -> dict[tuple[str, ...], str]:
    """The comment behind each setting, by (section, key)."""
    lines = text.split("\n")
    found: dict[tuple[str, ...], str] = {}
    for keys, number in locate_keys(text).items():
        if len(keys) == 2 and (comment := comment_of(lines[number - 1])):
            found[keys] = comment
    return found


def comment_of(line: str) -> str:
    """What stands behind the value; a '#' within the value is none, as cutting there would leave no TOML."""
    for hash_sign in (match.start() for match in re.finditer("#", line)):
        try:
            tomllib.loads(line[:hash_sign])
        except tomllib.TOMLDecodeError:
            continue
        return line[hash_sign + 1 :].strip()
    return ""


def save_schema(path: Path = SCHEMA) -> None:
    path.write_text(render_schema(PACKAGED_DEFAULTS.read_text()))


if __name__ == "__main__":
    save_schema()
    print(SCHEMA)
