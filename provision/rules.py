"""What a value of a machine file may be, beyond its type; and the rules that several settings share."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Rule:
    """What a string, or every string of a list, looks like (a whole match), and how a person is told so."""

    pattern: str
    meaning: str


@dataclass(frozen=True)
class Between:
    """The least and the greatest whole number that a setting may be."""

    least: int
    greatest: int


ONE_LINE = Rule(r"[^\n]*", "one line")
PACKAGE = Rule(r"[a-z0-9@_+][a-z0-9@._+-]*", "a package name")  # makepkg's rule for pkgname
COMMIT = Rule(r"[0-9a-f]{40}", "the 40 hexadecimal digits of a git commit")
USER = Rule(r"[a-z_][a-z0-9_-]{0,31}", "lower-case letters, digits, - and _, at most 32")
SHELL = Rule(r"/\S+", "an absolute path")
NAME = Rule(r"[a-z][a-z0-9_-]*", "a name of lower-case letters, digits, - and _")
# Without blanks, '.' and '..': a path is a name here, and one thing must have one.
PATH = Rule(r"(~?)(/(?!\.\.?(/|$))[^/\x00-\x20\x7f]+)+", "a path from / or ~/ on, without blanks, . and ..")
URL = Rule(r"((https?|file)://\S+)?", "a URL")
# Becomes an argument of pip and uv, where a first '-' would make it an option.
REQUIREMENT = Rule(r"[A-Za-z0-9][^\n]*", "a requirement such as numpy>=1.26")
INTERPRETER = Rule(r"\d+\.\d+(\.\d+)?|/\S+", "a version such as 3.12, or an absolute path")
