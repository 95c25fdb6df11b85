"""Several runs in one page, and a run for TensorBoard."""

import json
import sys
import webbrowser
from datetime import UTC, datetime
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from workload.__main__ import main
from workload.compare import differences, name_apart, place, render_comparison
from workload.config import load_config, render_toml
from workload.errors import WorkloadError
from workload.report import load_record
from workload.tensorboard import save_events

NOW = datetime(2026, 1, 2, tzinfo=UTC)


def make_run(out: Path, *settings: str, floor: float, steps: int = 20, tokens: int = 100) -> Path:
    """A run's files: a loss that falls to `floor`, half a second and `tokens` tokens a step."""
    out.mkdir(parents=True)
    (out / "config.toml").write_text(render_toml(load_config("demo", settings)), encoding="utf-8")
    rows: list[dict[str, object]] = [{"kind": "eval", "step": 0, "val_loss": 9.0, "val_bits_per_byte": 4.0}]
    for step in range(1, steps + 1):
        loss = floor + 5.0 / step
        rows.append(
            {"kind": "step", "step": step, "loss": loss, "lr": 1e-3, "grad_norm": 1.0, "tokens": step * tokens,
             "tokens_per_s": 2.0 * tokens, "elapsed_s": step / 2}
        )  # fmt: skip
        if step % 10 == 0:
            rows.append({"kind": "eval", "step": step, "val_loss": loss, "val_bits_per_byte": loss / 2})
            rows.append({"kind": "sample", "step": step, "prompt": "<A>", "text": f"after {step}"})
    rows.append({"kind": "event", "step": steps, "text": "the end"})
    (out / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return out


@pytest.fixture
def runs(tmp_path: Path) -> list[Path]:
    return [
        make_run(tmp_path / "runs" / "one", "train.lr=0.001", floor=3.0),
        make_run(tmp_path / "runs" / "two", "train.lr=0.002", "train.batch=24", "train.micro_batch=12", floor=2.0, tokens=300),
    ]  # fmt: skip


class Page(HTMLParser):
    """Cells of the table by row, and the curves of each set of charts."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self.sets: dict[str, list[str]] = {}
        self.best: list[str] = []
        self._set, self._cell, self._bold = "", False, False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        if tag == "tr":
            self.rows.append([])
        self._cell = tag in ("td", "th") or (self._cell and tag in ("b", "span"))
        if tag in ("td", "th"):
            self.rows[-1].append("")
        self._bold = tag == "b" and self._cell
        if tag == "div" and (values.get("class") or "").startswith("by by-"):
            self._set = str(values["class"]).removeprefix("by by-")
        if tag == "svg":
            self.sets.setdefault(self._set, []).append(str(values["aria-label"]))

    def handle_endtag(self, tag: str) -> None:
        self._cell = self._cell and tag != "table"

    def handle_data(self, data: str) -> None:
        if self._cell and data.strip():
            self.rows[-1][-1] += data
            if self._bold:
                self.best.append(data)


def test_the_page_has_curves_by_step_tokens_and_time_and_a_table_of_what_differs(runs: list[Path]) -> None:
    text = render_comparison([load_record(run) for run in runs], NOW)
    page = Page()
    page.feed(text)
    titles = ["Validation loss", "Training loss", "Bits per byte", "Learning rate", "Gradient norm", "Speed"]
    assert page.sets == {
        name: [f"{title} by {name}" for title in titles] for name in ("step", "tokens", "time")
    }
    head, one, two = page.rows
    assert head == [
        "run", "best validation loss", "bits/byte", "at step", "steps", "tokens", "tokens/s", "time",
        "train.batch", "train.lr",
    ]  # fmt: skip
    assert one == ["one", "3.2500", "1.6250", "20", "20", "2,000", "200", "0:10", "12", "0.001"]
    assert two == ["two", "2.2500", "1.1250", "20", "20", "6,000", "600", "0:10", "24", "0.002"]
    assert page.best == ["2.2500", "1.1250", "600"]
    assert "&lt;A&gt;</b>after 20" in text
    assert "http" not in text.replace("http-equiv", "")


def test_only_what_differs_is_a_difference() -> None:
    configs = [{"model": {"n": 1, "m": 2}, "train": {"lr": 1}}, {"model": {"n": 1, "m": 3}, "train": {}}]
    assert differences(configs) == {"model.m": [2, 3], "train.lr": [1, None]}
    assert differences([configs[0]] * 2) == {}


def test_steps_are_placed_by_tokens_and_seconds(runs: list[Path]) -> None:
    record = load_record(runs[1])
    steps = np.array([0.0, 10.0, 20.0, 25.0])
    assert place(record, "step", steps).tolist() == steps.tolist()
    assert place(record, "tokens", steps)[:3].tolist() == [0.0, 3000.0, 6000.0]
    assert place(record, "time", steps)[:3].tolist() == [0.0, 5.0, 10.0]
    assert np.isnan(place(record, "time", steps)[3])


def test_runs_of_one_name_are_told_apart_and_a_run_without_rows_is_there(
    tmp_path: Path, runs: list[Path]
) -> None:
    other = make_run(tmp_path / "more" / "one", floor=1.0)
    (other / "metrics.jsonl").write_text("")
    paths = [runs[0], other]
    records = name_apart([load_record(path) for path in paths], paths)
    assert [record.name for record in records] == ["runs/one", "more/one"]
    page = Page()
    page.feed(render_comparison(records, NOW))
    assert page.rows[2][:3] == ["more/one", "", ""]


def test_report_writes_one_or_compares_several_and_opens_them(
    runs: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shown: list[str] = []
    monkeypatch.setattr(webbrowser, "open", lambda url: bool(shown.append(url)) or True)
    monkeypatch.chdir(tmp_path)
    one, two = map(str, runs)
    assert main(["report", one]) == 0
    assert capsys.readouterr().out == f"{one}/report.html\n"
    assert main(["report", one, "--out", "page.html"]) == 0
    assert Path("page.html").read_bytes() == (runs[0] / "report.html").read_bytes()
    assert main(["report", one, two, "--open"]) == 0
    assert "2 runs" in Path("compare.html").read_text(encoding="utf-8")
    assert shown == [(tmp_path / "compare.html").as_uri()]
    capsys.readouterr()
    assert main(["report", one, str(tmp_path)]) == 1
    assert "no metrics.jsonl, so not a run" in capsys.readouterr().err
    assert main(["report", one, two, "--out", "nowhere/x.html"]) == 1
    assert "there is no folder nowhere" in capsys.readouterr().err


def test_without_tensorboard_there_is_one_readable_error(
    runs: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(WorkloadError, match="need the package tensorboard") as error:
        save_events(load_record(runs[0]), tmp_path / "events")
    assert error.value.hint == "pip install tensorboard"
    assert not (tmp_path / "events").exists()


@pytest.mark.filterwarnings("ignore")  # of the package, which is not ours to mend
def test_tensorboard_reads_what_was_written(
    runs: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    out = tmp_path / "events"
    assert main(["report", *map(str, runs), "--tensorboard", str(out)]) == 0
    assert capsys.readouterr().out.endswith(f"tensorboard --logdir {out}\n")
    events = EventAccumulator(str(out / "two")).Reload()
    loss = events.Scalars("loss/train")
    assert [event.step for event in loss] == list(range(1, 21))
    assert loss[0].value == pytest.approx(7.0)
    assert loss[19].wall_time - loss[0].wall_time == pytest.approx(9.5, abs=1e-3)
    assert [event.step for event in events.Scalars("loss/val")] == [0, 10, 20]
    assert "speed/mfu" not in events.Tags()["scalars"]
    assert {"sample/text_summary", "event/text_summary"} <= set(events.Tags()["tensors"])
    assert main(["report", str(runs[0]), "--tensorboard", str(out)]) == 1
    assert "exists and is not empty" in capsys.readouterr().err
