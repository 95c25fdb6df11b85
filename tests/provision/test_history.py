"""Records of verifications, what is told from them, and their page."""

import html.parser
from collections.abc import Mapping
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from provision.checks import Check, Outcome
from provision.history import (
    Entry,
    Record,
    compare,
    entry_of,
    load_records,
    parse_record,
    render_record,
    save_record,
    save_text,
)
from provision.verify_page import render_verify_page

BEGAN = datetime(2026, 11, 1, 12, 30, 5, tzinfo=UTC)
ABOUT = {"kernel": "6.18.44-1-lts", "processor": "Example 9", "cards": "10de:2684 (Ada)"}


def outcome(good: bool = True, **figures: float) -> Outcome:
    return Outcome(Check("training speed", "", "look at it"), good, "seen <b>", figures)


def record(days: int = 0, *, good: bool = True, about: Mapping[str, str] = ABOUT, **figures: float) -> Record:
    began = BEGAN + timedelta(days=days)
    return Record("gpu1", began, 12.5, "", about, (entry_of(outcome(good, **figures)),))


def test_a_record_survives_its_file(tmp_path: Path) -> None:
    kept = [record(0, card0_tokens_per_s=180000.5), record(1, good=False)]
    for each in reversed(kept):
        save_record(tmp_path, each)
    assert load_records(tmp_path) == (kept, [])
    assert [path.name for path in sorted(tmp_path.iterdir())] == [
        "20261101-123005.json",
        "20261102-123005.json",
    ]
    assert kept[1].entries[0].remedy == "look at it"
    assert not kept[1].good


@settings(max_examples=30, deadline=None)
@given(st.text(), st.text(), st.dictionaries(st.text(), st.floats(allow_nan=False, allow_infinity=False)))
def test_any_words_and_figures_are_kept(seen: str, left_out: str, figures: dict[str, float]) -> None:
    kept = Record("gpu1", BEGAN, 1.0, left_out, {seen: seen}, (Entry("a", False, seen, seen, figures),))
    kept_again = parse_record(render_record(kept).encode("utf-8", "replace").decode())
    assert kept_again.entries[0].figures == figures
    assert "<i>" not in render_verify_page([replace(kept, left_out="<i>", machine="<i>")])


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"format": 2}', '{"format": 1}', render_record(record())[:-40]]
)
def test_a_record_that_cannot_be_read_is_named_and_left_out(tmp_path: Path, text: str) -> None:
    save_record(tmp_path, record())
    (tmp_path / "20261105-000000.json").write_text(text)
    records, refused = load_records(tmp_path)
    assert records == [record()]
    assert len(refused) == 1
    assert "20261105-000000.json" in refused[0]


def test_what_is_there_stays_where_the_new_one_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_text(tmp_path / "page", "old")

    def full(path: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("provision.history.sync", full)
    with pytest.raises(OSError, match="No space"):
        save_text(tmp_path / "page", "new")
    assert (tmp_path / "page").read_text() == "old"


def test_slower_than_it_used_to_be_is_a_fault() -> None:
    earlier = [record(day, card0_tokens_per_s=float(speed)) for day, speed in enumerate((100, 102, 98, 5))]
    assert compare([outcome(card0_tokens_per_s=50)], ABOUT, earlier[:2]) is None, "two are too few to know"
    same = compare([outcome(card0_tokens_per_s=90)], ABOUT, earlier)
    assert same is not None
    assert same.good
    slow = compare([outcome(card0_tokens_per_s=80)], ABOUT, earlier)
    assert slow is not None
    assert not slow.good
    assert slow.seen == "card0_tokens_per_s is 80, and used to be 99;"
    assert "heat" in slow.check.remedy


def test_what_is_not_compared() -> None:
    earlier = [
        record(day, tokens_per_s=100.0, disk_read_mb_per_s=1000.0, temperature_c=60.0) for day in range(5)
    ]
    assert compare([outcome(tokens_per_s=10)], ABOUT, earlier) is None, "a processor has other work"
    assert compare([outcome(temperature_c=10)], ABOUT, earlier) is None
    disk = compare([outcome(disk_read_mb_per_s=499)], ABOUT, earlier)
    assert disk is not None
    assert not disk.good
    assert compare([outcome(disk_read_mb_per_s=499)], {**ABOUT, "cards": "none"}, earlier) is None, (
        "other hardware"
    )


class Parser(html.parser.HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_page_is_one_file_that_tells_all() -> None:
    records = [record(day, card0_tokens_per_s=100.0 + day) for day in range(3)] + [record(3, good=False)]
    page = Parser()
    page.feed(render_verify_page(records))
    names = [tag for tag, _ in page.tags]
    assert "script" not in names
    assert not any(key in ("src", "href") for _, attributes in page.tags for key in attributes)
    assert names.count("polyline") == 1
    points = next(attributes["points"] for tag, attributes in page.tags if tag == "polyline")
    assert points is not None
    assert len(points.split()) == 3
    for words in (
        "gpu1 1 bad",
        "→ look at it",
        "seen <b>",
        "card0 tokens per s102",
        "History, 4 in all",
        "2026-11-04 12:30",
    ):
        assert words in page.text
    assert page.text.index("2026-11-04 12:30") < page.text.index("2026-11-01 12:30")
