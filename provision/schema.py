"""The JSON Schema of machine files, for editors: `python -m provision.schema` writes machines/schema.json, and the
parts of the pages that are made of the same (provision.pages).

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
from provision.machine import PACKAGED_DEFAULTS, Named, Setting, named_sections, settings
from provision.pins import ALIAS
from provision.rules import Between, Rule
from provision.secrets import Secret

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
    examples = named_examples(defaults)
    told = {keys: text for example in examples.values() for keys, text in read_comments(example).items()}
    for section, thing in named_sections().items():
        properties[section] = describe_named(section, thing, told)
    schema = {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "title": "A machine of metal-to-model",
        "type": "object",
        "additionalProperties": False,
        "properties": properties,
    }
    return json.dumps(schema, indent=2, ensure_ascii=False) + "\n"


def named_examples(defaults: str) -> dict[str, str]:
    """The example of each section whose keys the person chooses: a commented block that begins with its header."""
    found = re.finditer(r"^# \[(?P<section>[a-z]+)[].].*(?:\n# .+)*", defaults, re.MULTILINE)
    return {match["section"]: re.sub(r"^# ", "", match[0], flags=re.MULTILINE) + "\n" for match in found}


def describe_named(section: str, thing: Named, told: dict[tuple[str, ...], str]) -> dict[str, Any]:
    """A section whose keys the person chooses. `told`: comments of its example, by keys; of a table's, the last key counts."""
    meanings = {keys[-1]: text for keys, text in told.items() if keys[0] == section}
    if isinstance(thing.each, Setting):
        each = describe(thing.each, None, "")
    else:
        fields = thing.kind.__dataclass_fields__
        each = {
            "type": "object",
            "additionalProperties": False,
            "properties": {
                key: describe(setting, plain(fields[key].default), meanings.get(key, ""))
                for key, setting in thing.each.items()
            },
        }
        if required := [key for key, setting in thing.each.items() if setting.required]:
            each["required"] = required
    header = next((text for keys, text in told.items() if keys[0] == section), "")
    return {
        "type": "object",
        **({"description": header} if header else {}),
        "propertyNames": {"pattern": whole(thing.name.pattern)},
        "additionalProperties": {"anyOf": [each, {"const": False}]},
    }


def plain(default: Any) -> Any:
    """A dataclass's default as JSON; None where a table must have it said."""
    if isinstance(default, tuple):
        return list(default)
    if isinstance(default, Secret):
        return default.reference
    return default if isinstance(default, (str, int)) else None


def describe(setting: Setting, default: object, meaning: str) -> dict[str, Any]:
    """One setting as a schema; without a default where that is None."""
    found = described(setting, meaning)
    return found if default is None else {**found, "default": default}


def described(setting: Setting, meaning: str) -> dict[str, Any]:
    text = {"description": meaning} if meaning else {}
    if setting.kind is bool:
        return {**text, "type": "boolean"}
    if isinstance(setting.rule, Between):
        span = {"minimum": setting.rule.least, "maximum": setting.rule.greatest}
        return {**text, "type": "integer", **span}
    rule = pattern_of(setting.rule) if isinstance(setting.rule, Rule) else {}
    if setting.kind == tuple[str, ...]:
        return {**text, "type": "array", "items": {"type": "string", **rule}}
    return {**text, "type": "string", **rule}


def pattern_of(rule: Rule) -> dict[str, Any]:
    """A list of choices where the rule is one, which editors complete; else a pattern."""
    if CHOICE.fullmatch(rule.pattern):
        return {"enum": rule.pattern.split("|")}
    return {"pattern": whole(rule.pattern)}


def whole(pattern: str) -> str:
    return f"^(?:{pattern})$"  # a schema's pattern may match anywhere, a Rule's matches the whole


def read_comments(text: str) -> dict[tuple[str, ...], str]:
    """The comment behind each header and each setting, by its keys."""
    lines = text.split("\n")
    found: dict[tuple[str, ...], str] = {}
    for keys, number in locate_keys(text).items():
        if comment := comment_of(lines[number - 1]):
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
    from provision.pages import save_pages  # which is made of what is above

    save_schema()
    save_pages()
    print(SCHEMA)
