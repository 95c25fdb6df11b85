"""RESULTS.md: one part a benchmark, each written by its own command without touching the others."""

from pathlib import Path

PATH = Path(__file__).with_name("RESULTS.md")


def write_part(text: str, path: Path = PATH) -> None:
    """Put `text`, whose first line is its title, in the place of the part with that title, or at the end."""
    title = text.partition("\n")[0]
    parts = split_parts(path.read_text() if path.exists() else "")
    parts[title] = text.rstrip() + "\n"
    path.write_text("\n".join(parts.values()))


def split_parts(text: str) -> dict[str, str]:
    """Title → part. A part begins with a heading of the first level."""
    parts: dict[str, str] = {}
    title = ""
    for line in text.splitlines(keepends=True):
        if line.startswith("# "):
            title = line.rstrip("\n")
        if title:
            parts[title] = parts.get(title, "") + line
    return {title: part.rstrip() + "\n" for title, part in parts.items()}
