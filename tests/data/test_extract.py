"""Prompts and extraction of LLM-Adapters, to the letter, and the scores that its own files give."""

import json
import math
import os
import string
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.data.test_load import SHARED, shared
from tunesmith.data import extract, load, tasks
from tunesmith.data.metrics import accuracy, json_scores, macro_f1
from tunesmith.data.tasks.prompts import alpaca

GOLDEN = Path(os.environ.get("GOLDEN_DIR") or Path(__file__).parents[1] / "golden" / "data") / "llm-adapters" / "text_extraction.json"
CASES = json.loads(GOLDEN.read_text()) if GOLDEN.exists() else {}
golden = pytest.mark.skipif(not CASES, reason="GOLDEN_DIR has no llm-adapters/text_extraction.json")
OPTIONS = {"boolq": ["true", "false"], "piqa": ["solution1", "solution2"], "winogrande": ["option1", "option2"], "hellaswag": [f"ending{i}" for i in range(1, 5)]}
ANSWERS = [f"answer{i}" for i in range(1, 6)]


@golden
@pytest.mark.parametrize("case", CASES.get("number", []), ids=lambda case: case["text"])
def test_numbers(case):
    assert extract.number(case["text"]) == float(case["expected"])


@golden
@pytest.mark.parametrize("case", CASES.get("letter", []), ids=lambda case: case["text"])
def test_letters(case):
    assert extract.letter(case["text"]) == case["expected"]


@golden
@pytest.mark.parametrize("case", CASES.get("commonsense", []), ids=lambda case: case["text"])
def test_options(case):
    assert extract.option(case["text"], OPTIONS.get(case["dataset"], ANSWERS)) == case["expected"]


@golden
def test_prompts():
    prompts = CASES["prompts"]
    assert alpaca("INS", training=True) + "OUT" == prompts["train_no_input"] and alpaca("INS", "INP", training=True) + "OUT" == prompts["train_input"]
    assert alpaca("INS") == prompts["eval_no_input"] and alpaca("INS", "INP") == prompts["eval_input"]
    assert "{x}" in alpaca("{x}")


def test_the_traps_of_the_rules():
    assert [extract.number(text) for text in ("10-3=7", "$18.00!", "1e3", ".5", "")] == [7, 18, 3, 5, math.inf]
    assert extract.letter("A car; the answer is (C).", "strict") == extract.letter("answer is: C", "strict") == "C"
    assert extract.letter("the answer is Cars", "strict") == extract.letter("A B C", "strict") == ""
    assert extract.option("untrue", ["true", "false"]) == "true" and extract.option("answer10", ANSWERS) == "answer1"
    assert extract.same_number(2.0005, 2) and not extract.same_number(2.002, 2) and not extract.same_number(math.inf, 2)


@given(st.floats(-1e6, 1e6).map(lambda x: round(x, 3)), st.text(string.ascii_letters + " \n!$=+%", max_size=30))
def test_the_last_number_of_any_text(number, after):
    assert extract.number(f"7 then {number:,.3f}{after}") == pytest.approx(number)


@given(st.text(max_size=40), st.sampled_from("ABCDE"))
def test_the_strict_letter_is_found_in_any_text(text, letter):
    before = text.replace("answer is", "")
    assert extract.letter(f"{before}. The answer is ({letter}).", "strict") == letter and extract.letter(before, "strict") == ""


@shared
@pytest.mark.parametrize(("name", "rule", "share"), [("aqua", "official", 0.4291), ("aqua", "strict", 0.4843), ("addsub", "official", 0.9367), ("singleeq", "official", 0.9528)])
def test_scores_of_the_shipped_rationales(monkeypatch, name, rule, share):
    monkeypatch.setenv("TUNESMITH_DATA", str(SHARED))
    rows, task = load(name, "test"), tasks.get("math", rule=rule)
    golds = task.golds(rows, task.columns(rows))
    right = [task.score(text, gold)[1] for text, gold in zip(rows["output"], golds, strict=True)]
    assert sum(right) / len(right) == pytest.approx(share, abs=5e-5)


def test_scores_of_answers():
    assert accuracy("aabb", "aaba") == 0.75
    sklearn = pytest.importorskip("sklearn.metrics")
    expected, predicted = list("aabbccc"), list("abbbcda")
    assert macro_f1(expected, predicted) == pytest.approx(sklearn.f1_score(expected, predicted, average="macro", zero_division=0))
    assert json_scores(['{"a": 1, "b": 2}', '{"a": 3}'], ['{"b": 2, "a": 0}', "no"]) == {"json_valid": 0.5, "json_field_accuracy": pytest.approx(1 / 3)}
    assert json_scores(["text"], ['{"a": 1}']) == json_scores([], []) == {}
    assert extract.same_answer('{"a": 1, "b": 2}', '{"b":2,"a":1}') and not extract.same_answer("1", "1.0")
