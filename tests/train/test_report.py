"""The report: everything in it is true to the run's files, and nothing in it can harm its reader."""

import base64
import hashlib
import json
import math
import re
from collections import Counter
from html.parser import HTMLParser

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tunesmith.errors import TunesmithError
from tunesmith.train import folder as run_folder
from tunesmith.train import render, report, svg

HOSTILE = ["<script>alert(1)</script>", '"><img src=x onerror=alert(1)>', "a & b", "{{ 7 * 7 }}", "ümläut ', \u202e", "\ud800 half"]
VOID = {"meta", "br", "hr", "img", "input", "link"}


class Page(HTMLParser):
    """What a reader gets: the tags in order, their attributes, the text; fails on tags that do not close."""

    def __init__(self, html: str):
        super().__init__()
        self.tags, self.open, self.text, self.scripts = [], [], "", []
        self.feed(html)
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, f"</{tag}> closes nothing"

    def handle_data(self, data):
        if self.open and self.open[-1] == "script":
            self.scripts.append(data)
        elif not (self.open and self.open[-1] == "style"):
            self.text += data

    def values(self, attribute):
        return [attributes[attribute] for _, attributes in self.tags if attribute in attributes]

    def count(self, tag):
        return sum(name == tag for name, _ in self.tags)


def write_run(folder, labels=("refund", "card"), predictions=None, test=None, summary=(), recipe="model: minilm\nmethod: lora\ndata: d.csv\n"):
    folder.mkdir(exist_ok=True)
    log = [{"step": s, "epoch": s / 50, "loss": 3 / s, "lr": 1e-3 / s, "tokens_per_s": 5000.0 + s, "time_s": s, "peak_mb": 900} for s in range(5, 101, 5)]
    log += [{"step": s, "epoch": s / 50, "eval": {"accuracy": a, "loss": 0.5}} for s, a in ((50, 0.75), (100, 0.7))]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in log))
    about = {
        "method": "lora", "model": "minilm", "task": "classification", "metric": "accuracy", "higher_is_better": True, "best": 0.75,
        "final": 0.7, "best_step": 50, "eval": {"accuracy": 0.75}, "base_metrics": {"accuracy": 0.125},
        "params": {"trainable": 73728, "total": 22786944, "percent": 0.3236, "bytes": 296000},
        "time_s": 192.0, "train_s": 61.5, "peak_mb": 912.4, "steps": 100, "epochs": 2.0, "stopped_early": False,
    }  # fmt: skip
    (folder / "summary.json").write_text(json.dumps(about | dict(summary)))
    (folder / "recipe.yaml").write_text(recipe)
    (folder / "versions.json").write_text(json.dumps({"python": "3.12.1", "torch": "2.13.0", "gpu": None}))
    (folder / "data.json").write_text(json.dumps({"source": "d.csv", "rows": 1234, "columns": {"text": "t"}, "fingerprint": "f" * 64, "labels": list(labels)}))
    if predictions is None:
        predictions = [
            {"input": f"text {i}", "expected": a, "predicted": b, "correct": a == b} for i, (a, b) in enumerate((x, y) for x in labels for y in labels)
        ]
    (folder / "predictions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in predictions))
    if test is not None:
        (folder / "test_predictions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in test))
    return folder


def written(folder):
    html = report.write(folder).read_text(encoding="utf-8")
    return html, Page(html)


def test_says_what_the_files_say(tmp_path):
    _, page = written(write_run(tmp_path / "run"))
    text = re.sub(r"\s+", " ", page.text)
    for said in (
        "lora on minilm", "0.750", "at the end 0.700", "untouched model 0.125", "+0.625 through training", "73,728", "0.32 % of the model",
        "296.0 kB", "912 MB", "3 min 12 s", "1 min 02 s", "2 of 4 predictions on the evaluation data", "Best: 0.750 at step 50",
        "Training loss", "Learning rate", "Speed", "Confusion", "f" * 64, "2.13.0", "tunesmith train", "rows 1,234", "gpu none",
    ):  # fmt: skip
        assert re.sub(r"\s+", "", said) in re.sub(r"\s+", "", text), said


def test_is_one_file_that_needs_no_network_and_runs_one_script(tmp_path):
    html, page = written(write_run(tmp_path / "run"))
    assert not [v for attribute in ("src", "srcset", "action", "data", "poster") for v in page.values(attribute)]
    assert all(link.startswith("#") for link in page.values("href"))
    assert not re.search(r"url\(|@import|https?://", html)
    policy = next(content for content in page.values("content") if "default-src" in content)
    digest = base64.b64encode(hashlib.sha256(page.scripts[0].encode()).digest()).decode()
    assert len(page.scripts) == 1
    assert policy == f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"


def test_is_accessible(tmp_path):
    _, page = written(write_run(tmp_path / "run"))
    ids = page.values("id")
    assert len(ids) == len(set(ids))
    assert set(page.values("aria-labelledby")) <= set(ids)
    assert {link[1:] for link in page.values("href")} <= set(ids)
    assert all(attributes.get("role") == "img" and "aria-labelledby" in attributes for tag, attributes in page.tags if tag == "svg")
    assert all(attributes.get("scope") in ("row", "col") for tag, attributes in page.tags if tag == "th")
    assert page.count("h1") == 1


def test_texts_and_labels_of_the_user_are_text(tmp_path):
    predictions = [{"input": a, "expected": b, "predicted": c, "correct": b == c, "base_predicted": a} for a in HOSTILE for b in HOSTILE for c in HOSTILE]
    folder = write_run(tmp_path / "run", HOSTILE, predictions, summary={"model": HOSTILE[0], "method": HOSTILE[1]}.items(), recipe=f"model: '{HOSTILE[0]}'\n")
    html, page = written(folder)
    assert page.count("script") == 1 and page.count("img") == 0
    assert not [name for _, attributes in page.tags for name in attributes if name.startswith("on")]
    assert HOSTILE[0] in page.text and "{{ 7 * 7 }}" in page.text and "a & b" in page.text
    assert "<script>alert" not in html


def test_what_is_missing_is_left_out(tmp_path):
    tmp_path.joinpath("recipe.yaml").write_text("model: minilm\nmethod:\n  method: dora\n  rank: 8\n")
    _, page = written(tmp_path)
    assert "dora on minilm" in page.text and "has not finished" in page.text
    assert page.count("svg") == page.count("table") == 0
    assert [attributes.get("id") for tag, attributes in page.tags if tag == "h2"] == ["reproduce"]


def test_a_run_without_evaluation(tmp_path):
    folder = write_run(tmp_path / "run", predictions=[], summary={"best": None, "final": None, "eval": {}, "base_metrics": None}.items())
    lines = [line for line in (folder / "metrics.jsonl").read_text().splitlines() if "eval" not in line]
    (folder / "metrics.jsonl").write_text("\n".join(lines))
    _, page = written(folder)
    assert "73,728" in page.text and "best" not in page.text


def test_test_data_takes_precedence(tmp_path):
    tested = [{"input": "q", "expected": "card", "predicted": "card", "correct": True}] * 9
    folder = write_run(tmp_path / "run", test=tested, summary={"test": {"accuracy": 1.0}, "base_test_metrics": {"accuracy": 0.25}}.items())
    text = " ".join(written(folder)[1].text.split())
    assert "9 of 9 predictions on the test data" in text
    assert "accuracy on the test data 1.000" in text.replace("data1", "data 1") and "untouched model 0.250" in text


def test_answers_before_and_after(tmp_path):
    row = {"input": "q", "expected": "42", "predicted": "42", "correct": True, "base_predicted": "I am a language model."}
    folder = write_run(tmp_path / "run", predictions=[row, row | {"predicted": None, "correct": False}], summary={"task": "sft"}.items())
    _, page = written(folder)
    assert "Before and after" in page.text and "I am a language model." in page.text and "no answer" in page.text
    assert "Confusion" not in page.text


def test_the_killed_run_and_the_broken_file(tmp_path):
    folder = write_run(tmp_path / "run")
    log = folder / "metrics.jsonl"
    log.write_text(log.read_text() + '{"step": 105, "lo')
    assert "Training loss" in written(folder)[1].text
    log.write_text('{"step": 5\n' + log.read_text())
    with pytest.raises(TunesmithError, match=r"metrics\.jsonl, line 1 is not JSON"):
        report.write(folder)
    (folder / "summary.json").write_text("{")
    with pytest.raises(TunesmithError, match="summary.json is not JSON"):
        report.write(folder)


def test_not_a_run(tmp_path):
    with pytest.raises(TunesmithError, match="holds no run"):
        report.write(tmp_path)


def test_numbers_that_are_none(tmp_path):
    folder = write_run(tmp_path / "run")
    rows = [{"step": s, "epoch": 0.1, "loss": math.nan if s % 2 else 1.0, "lr": 0.0} for s in range(40)]
    (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)))
    html, page = written(folder)
    assert "nan" not in "".join(page.values("points")) and "Training loss" in html


@pytest.mark.parametrize(("labels", "drawn"), [(40, True), (41, False)])
def test_heat_map_for_few_labels_table_for_many(tmp_path, labels, drawn):
    html, page = written(write_run(tmp_path / "run", [f"label {i}" for i in range(labels)]))
    assert ('class="heat"' in html) == drawn
    assert "The most confused pairs" in page.text and f"label {labels - 1}" in page.text


def test_a_very_long_text_is_cut_in_the_middle():
    said = report.clip("a" * 60_000 + "b" * 40_000)
    assert len(said) < 1300 and said.startswith("aaa") and said.endswith("bbb") and "98,800 characters left out" in said
    assert report.clip("a" * 1200) == "a" * 1200
    assert report.clip({"a": 1}) == '{"a": 1}'


def test_wilson_interval():
    assert report.interval(8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    assert report.interval(0, 10)[0] == pytest.approx(0, abs=1e-12)


@given(st.lists(st.tuples(st.sampled_from("abcde"), st.sampled_from("abcdef")), min_size=1))
def test_per_class_counts(pairs):
    rows = {row["label"]: row for row in report.per_class(Counter(pairs))}
    assert set(rows) == {label for pair in pairs for label in pair}
    for label, row in rows.items():
        hits = sum(e == p == label for e, p in pairs)
        expected, predicted = sum(e == label for e, _ in pairs), sum(p == label for _, p in pairs)
        assert row["n"] == expected
        assert row["recall"] == (hits / expected if expected else None)
        assert row["precision"] == (hits / predicted if predicted else None)
        assert row["f1"] == pytest.approx(2 * hits / (expected + predicted))


numbers = st.floats(-1e9, 1e9, allow_subnormal=False).map(lambda x: 0.0 if abs(x) < 1e-9 else x)


@given(st.lists(numbers, min_size=1, max_size=60), st.integers(1, 40))
def test_average_stays_within_its_window(values, span):
    averaged = [y for _, y in report.smooth(list(enumerate(values)), span)]
    slack = 1e-9 * sum(map(abs, values)) + 1e-9
    for i, y in enumerate(averaged):
        window = values[max(0, i - span // 2) : i + span // 2 + 1]
        assert min(window) - slack <= y <= max(window) + slack


@given(st.lists(numbers, min_size=1, max_size=20), st.booleans())
@example([1e6, 1e6 + 10], False)
@example([-4.0, -4.0], False)
@example([0.0], False)
@example([1e-4, 2e-4], False)
def test_axis_holds_every_value_between_readable_ticks(values, log):
    if log:
        values = [abs(v) + 1e-6 for v in values]
    axis = svg.axis(values, "x", log)
    assert all(-1e-6 <= axis(v) <= 1 + 1e-6 for v in values)
    at, texts = zip(*axis.ticks, strict=True)
    assert list(at) == sorted(set(at)) and len(set(texts)) == len(texts) and len(texts) <= 20


def test_steps_are_whole():
    assert [text for _, text in svg.axis([1, 2], "step").ticks] == ["1", "2"]


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(numbers, numbers), min_size=1, max_size=30))
def test_any_series_is_drawn(points):
    Page(svg.lines([svg.Series("<a>", sorted(points)), svg.Series("b", [points[0]], "ring")], "x", "y", "id", (points[0][1], "base")))


def test_thin_keeps_both_ends():
    assert svg.thin(range(1000), 7)[::6] == [0, 999]
    assert svg.thin([1, 2], 7) == [1, 2]


def test_a_front_lies_over_the_other_points_which_have_their_names_on_hover_alone():
    points = [svg.Point(1, 1, "ours"), svg.Point(1, 0.9, "theirs", labelled=False)]
    drawn = str(svg.scatter(points, [0], "x", "y", "id"))
    assert drawn.index("theirs: y 0.9") < drawn.index("ours: y 1")
    assert ">ours</text>" in drawn and ">theirs</text>" not in drawn


@pytest.mark.parametrize(
    ("write", "value", "text"),
    [
        (render.number, 1234567, "1,234,567"), (render.number, 0.91234, "0.912"), (render.number, 12.345, "12.35"), (render.number, 5123.4, "5,123"),
        (render.number, 0.0, "0"), (render.number, 3.7e-5, "3.7e-5"), (render.number, math.nan, "nan"), (render.size, 999, "999 B"),
        (render.size, 602_345, "602.3 kB"), (render.size, 1.5e9, "1.50 GB"), (render.duration, 59.94, "59.9 s"), (render.duration, 3599.6, "1 h 00 min"),
        (render.duration, 61, "1 min 01 s"), (render.percent, 0.0004, "0.0004 %"), (render.percent, 12.3, "12.30 %"),
        (render.model_name, "/home/a/model", "model"), (render.model_name, "org/model", "org/model"),
        (render.method_label, {"method": "lora", "rank": 8, "targets": None}, "lora (rank 8)"), (render.method_label, "dora", "dora"),
        (render.method_label, {"method": "combined", "parts": [{"method": "lora", "rank": 8}, "ssf"], "lr": 0.001}, "lora (rank 8) + ssf (lr 0.001)"),
    ],
)  # fmt: skip
def test_numbers_as_people_read_them(write, value, text):
    assert write(value) == text


def test_predictions_of_any_text_are_read_back(tmp_path):
    rows = [{"input": text, "predicted": text[::-1]} for text in ("one\u2028two", "a\x85b", "\x0b\x0c\x1c", 'line\nbreak "quoted"')]
    run_folder.write_rows(tmp_path / "eval_base.jsonl", rows)
    run_folder.write_predictions(tmp_path, "eval", rows)
    assert run_folder.read_rows(tmp_path / "predictions.jsonl") == [row | {"base_predicted": row["predicted"]} for row in rows]
