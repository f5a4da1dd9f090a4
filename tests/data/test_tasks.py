"""Columns, labels and examples of every task."""

import time
import warnings

import pytest
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from tests import tiny
from tunesmith.data import load, tasks
from tunesmith.data.tasks.prompts import spans, supervised
from tunesmith.errors import TunesmithError

CHAT, ENCODER = tiny.tiny_tokenizer(), tiny.tiny_tokenizer(classifier=True)
PLAIN = tiny.tiny_tokenizer()
PLAIN.chat_template = None
ARC = "Please choose: Why?\n\nAnswer1: a Answer2: b Answer3: c\n\nAnswer format: answer1/answer2/answer3"
TALK = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "my card"}, {"role": "user", "content": "what?"}, {"role": "assistant", "content": "the rate"}]


def table(**columns):
    return Dataset.from_dict(columns)


def learned(tokenizer, example):
    return tokenizer.decode([label for label in example["labels"] if label != -100])


def refused(match, call, *args, **options):
    with pytest.raises(TunesmithError, match=match) as caught:
        call(*args, **options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("dataset", "task", "columns"), [
    (table(Utterance=["a"], Intent=["b"]), "classification", {"text": "Utterance", "label": "Intent"}),
    (table(id=["1"], query=["a"], category=["b"]), "classification", {"text": "query", "label": "category"}),
    (table(prompt=["a"], completion=["b"]), "sft", {"prompt": "prompt", "response": "completion"}),
    (table(instruction=["a"], input=[""], output=["b"]), "sft", {"prompt": "instruction", "response": "output", "input": "input"}),
    (table(question=["a"], answer=["b"]), "sft", {"prompt": "question", "response": "answer"}),
    (table(messages=[TALK]), "sft", {"messages": "messages"}),
    (table(question=["a"], answer=["b\n#### 3"]), "math", {"question": "question", "answer": "answer"}),
    (table(instruction=["a"], output=["so 3"], answer=["3.0"]), "math", {"question": "instruction", "answer": "answer", "rationale": "output"}),
    (table(question=["a"], answer=["B"]), "math", {"question": "question", "answer": "answer"}),
    (table(instruction=[ARC], output=["x"], answer=["answer3"]), "choice", {"question": "instruction", "answer": "answer"}),
    (table(question=["a"], choices=[["x", "y"]], answer=[1]), "choice", {"question": "question", "choices": "choices", "answer": "answer"}),
    (table(text=["a"]), "lm", {"text": "text"}),
])  # fmt: skip
def test_the_obvious_task_and_columns(dataset, task, columns):
    assert tasks.guess(dataset) == task and tasks.get(task).columns(dataset) == columns


def test_names_that_are_wrong():
    rows = table(text=["a", "b"], label=["x", "y"])
    refused('task "classificatoin" is unknown .did you mean \'classification\'', tasks.get, "classificatoin")
    refused("do not tell the task; say which one", tasks.guess, table(foo=["a"], bar=["b"]))
    task = tasks.get("classification")
    refused("no column \"lable\" .for label. .did you mean 'label'.*the columns are text, label", task.columns, rows, {"label": "lable"})
    refused("no column role \"txt\" .did you mean 'text'", task.columns, rows, {"txt": "text"})
    refused("needs a column for label, and none of the columns foo, text is obviously it", task.columns, table(foo=["a"], text=["b"]))
    assert task.columns(table(foo=["a"], bar=["b"]), {"text": "bar", "label": "foo"}) == {"text": "bar", "label": "foo"}
    with pytest.warns(UserWarning, match='no column "more" .for input.; it is left out'):
        assert tasks.get("sft").columns(table(p=["a"], r=["b"]), {"prompt": "p", "response": "r", "input": "more"}) == {"prompt": "p", "response": "r"}


def test_blank_cells_are_named_by_row():
    task = tasks.get("classification")
    refused('"text" .text. is blank in rows 2, 3 of 3', task.columns, table(text=["a", " \n", None], label=["x", "y", "x"]))
    refused("is blank in row 1 of 2", task.columns, table(text=["a", "b"], label=[float("nan"), 1.0]))
    refused("rows 1, 2, 3, 4, 5 and 3 more of 8", task.columns, table(text=[""] * 8, label=["x"] * 8))
    refused('"answer" .response. is blank', tasks.get("sft").columns, table(prompt=["a"], answer=[""]))
    assert tasks.get("sft").columns(table(instruction=["a"], input=[None], output=["b"]))["input"] == "input"


def test_labels_are_sorted_and_odd_ones_are_said():
    task, columns = tasks.get("classification"), {"text": "text", "label": "label"}
    with pytest.warns(UserWarning, match='1 of 3 labels occur in one row only.*"c"'):
        assert task.labels(table(text=["t"] * 5, label=list("bbaac")), columns) == ["a", "b", "c"]
    assert task.labels(table(text=["t"] * 6, label=[10, 9, 2, 10, 9, 2]), columns) == ["2", "9", "10"]
    refused('only the label "a"', task.labels, table(text=["t"], label=["a"]), columns)
    refused("row 2 has the label \"creditcard\".*not among the 2 labels.*did you mean 'credit_card'", task.encode,
            table(text=["t", "u"], label=["rate", "creditcard"]), columns, ENCODER, ["credit_card", "rate"])  # fmt: skip


def test_classification_examples():
    rows = table(text=["my card", "the rate " * 100], label=["b", "a"])
    examples = tasks.get("classification").encode(rows, {"text": "text", "label": "label"}, ENCODER, ["a", "b"], 16)
    assert examples[0] == {"input_ids": ENCODER("my card")["input_ids"], "labels": 1}
    assert examples[1] == {"input_ids": ENCODER("the rate " * 100, truncation=True, max_length=16)["input_ids"], "labels": 0}


@given(st.text(alphabet="ab \n€1", max_size=400), st.integers(3, 20))
@settings(deadline=None)
def test_cutting_characters_first_changes_nothing(text, max_length):
    rows = table(text=["." + text, "." + " " * 3000 + text], label=["a", "b"])
    for example, whole in zip(tasks.get("classification").encode(rows, {"text": "text", "label": "label"}, ENCODER, ["a", "b"], max_length), rows["text"], strict=True):
        assert example["input_ids"] == ENCODER(whole, truncation=True, max_length=max_length)["input_ids"]


def test_a_very_long_text_costs_no_more_than_it_must():
    columns, task = {"text": "text", "label": "label"}, tasks.get("classification")
    start = time.perf_counter()
    task.encode(table(text=["my card is blocked " * 500_000] * 2, label=["a", "b"]), columns, ENCODER, ["a", "b"], 512)
    assert time.perf_counter() - start < 2


def test_sft_learns_the_answers_alone():
    rows = table(prompt=["what is 12?", "hi"], response=["my card", "the rate"], system=["be brief", ""])
    task = tasks.get("sft")
    first, second = task.encode(rows, task.columns(rows), CHAT)
    assert CHAT.decode(first["input_ids"]) == "<|system|>be brief<eos><|user|>what is 12?<eos><|assistant|>my card<eos>"
    assert learned(CHAT, first) == "my card<eos>" and CHAT.decode(second["input_ids"]) == "<|user|>hi<eos><|assistant|>the rate<eos>"
    alpaca = table(instruction=["add"], input=["1 2"], output=["3"])
    plain = task.encode(alpaca, task.columns(alpaca), PLAIN)[0]
    assert PLAIN.decode(plain["input_ids"]) == "### Instruction:\nadd\n\n1 2\n\n### Response:\n3<eos>" and learned(PLAIN, plain) == "3<eos>"
    literal = tasks.get("sft", prompt="alpaca").encode(alpaca, task.columns(alpaca), CHAT)[0]
    assert "### Input:\n                1 2\n" in CHAT.decode(literal["input_ids"]) and learned(CHAT, literal) == "3<eos>"
    refused('prompt style "chatt" is unknown', tasks.get("sft", prompt="chatt").encode, alpaca, {"prompt": "instruction", "response": "output"}, CHAT)
    refused("needs a tokenizer with a chat template", tasks.get("sft", prompt="chat").encode, alpaca, {"prompt": "instruction", "response": "output"}, PLAIN)


def test_conversations_learn_every_answer():
    sharegpt = [{"from": {"user": "human", "assistant": "gpt"}[m["role"]], "value": m["content"]} for m in TALK]
    task = tasks.get("sft")
    for rows in (table(messages=[TALK]), table(conversations=[sharegpt])):
        example = task.encode(rows, task.columns(rows), CHAT)[0]
        assert learned(CHAT, example) == "my card<eos>the rate<eos>"
        assert CHAT.decode(example["input_ids"]) == CHAT.apply_chat_template(TALK, tokenize=False)
    refused("row 1: the last message is not an answer", task.columns, table(messages=[TALK[:3]]))
    refused("row 1: the column \"messages\" should hold messages", task.columns, table(messages=["hello"]))


def test_templates_with_quirks():
    tokenizer = tiny.tiny_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] | trim }}<eos>\n{% endfor %}{% if add_generation_prompt %}>{% endif %}"
    example = supervised(tokenizer, spans(tokenizer, TALK[:2], "chat"), 64)  # the prompt's ">" is not in the conversation
    assert tokenizer.decode(example["input_ids"]) == "hi<eos>\n>my card<eos>" and learned(tokenizer, example) == "my card<eos>"
    tokenizer.chat_template = "{% for m in messages %}{% if not loop.last %}~{% endif %}{{ m['content'] }}<eos>\n{% endfor %}"
    assert learned(tokenizer, supervised(tokenizer, spans(tokenizer, TALK, "chat"), 64)) == "the rate<eos>"
    tokenizer.chat_template = "{{ raise_exception('no system message') }}"
    refused("chat template refuses this conversation: no system message", spans, tokenizer, TALK, "chat")


@given(st.text("ab 1\n!é", max_size=30), st.text("ab 1\n!é", min_size=1, max_size=30))
@settings(deadline=None)
def test_tokens_that_would_span_the_border_are_kept_apart(before, answer):
    example = supervised(PLAIN, [(before, False), (answer, True)], 200)
    start = PLAIN.encode(before)
    assert example["input_ids"][: len(start)] == start and set(example["labels"][: len(start)]) <= {-100}
    assert example["labels"][len(start) :] == example["input_ids"][len(start) :]
    assert PLAIN.decode(example["input_ids"]) == before + answer + "<eos>" and learned(PLAIN, example) == answer + "<eos>"


@given(st.integers(0, 60), st.integers(1, 60), st.integers(4, 50))
@settings(deadline=None)
def test_what_is_cut_from_an_example_that_is_too_long(before, answer, max_length):
    whole = supervised(PLAIN, [("!" * before, False), ("é" * answer, True)], 500)
    example = supervised(PLAIN, [("!" * before, False), ("é" * answer, True)], max_length)
    size, kept = len(example["input_ids"]), [label for label in example["labels"] if label != -100]
    assert size == min(max_length, len(whole["input_ids"])) and kept == [label for label in whole["labels"] if label != -100][: len(kept)]
    assert kept and size - len(kept) >= min(before, max_length // 2)


def test_long_examples_are_said():
    rows = table(prompt=["hi", "hi"], response=["my card " * 50, "x"])
    with pytest.warns(UserWarning, match="1 of 2 examples fill max_length=20 tokens"):
        tasks.get("sft").encode(rows, {"prompt": "prompt", "response": "response"}, CHAT, None, 20)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tasks.get("sft").encode(rows, {"prompt": "prompt", "response": "response"}, CHAT, None, 400)


def test_math_learns_what_is_extracted_later():
    rows = table(question=["a?", "b?"], answer=["He has 2+2=<<2+2=4>>4.\n#### 4", "So 1,000 + 2\n#### 1,002"])
    task = tasks.get("math")
    columns = task.columns(rows)
    assert task.golds(rows, columns) == [4, 1002]
    assert task.solutions(rows, columns) == ["He has 2+2=4.\nThe answer is 4.", "So 1,000 + 2\nThe answer is 1,002."]
    assert all(task.score(text, gold)[1] for text, gold in zip(task.solutions(rows, columns), task.golds(rows, columns), strict=True))
    assert learned(CHAT, task.encode(rows, columns, CHAT)[0]) == "He has 2+2=4.\nThe answer is 4.<eos>"
    theirs = table(instruction=["q"] * 3, output=["\nA: 1 + 1 = 2. The answer is 2.", "It is 2", "The answer is 7."], answer=["2.0", "2", "2"])
    assert task.solutions(theirs, task.columns(theirs)) == ["A: 1 + 1 = 2. The answer is 2.", "It is 2\nThe answer is 2.", "The answer is 2."]
    letters = table(question=["q"] * 2, answer=["B", "(C)"])
    assert task.golds(letters, task.columns(letters)) == ["B", "C"] and task.score("A is B", "B") == ("A", False)
    assert tasks.get("math", rule="strict").score("A: the answer is (B)", "B") == ("B", True)
    refused("row 2: the answer \"none\" holds no number", task.columns, table(question=["q", "r"], answer=["1", "none"]))
    refused('extraction rule "lax" is unknown', tasks.get, "math", rule="lax")


def test_choices_in_every_form():
    task = tasks.get("choice")
    arc = table(instruction=[ARC], answer=["answer2"])
    question = task.questions(arc, task.columns(arc))[0]
    assert question.names == ["answer1", "answer2", "answer3"] and question.candidates[1] == "the correct answer is answer2" and question.answer == 1
    assert learned(CHAT, task.encode(arc, task.columns(arc), CHAT)[0]) == "the correct answer is answer2<eos>"
    for choices, answer in (
        (["x", "y", "z"], 1), (["x", "y", "z"], "B"), (["x", "y", "z"], "y"), ('["x", "y", "z"]', "1"), ({"text": ["x", "y", "z"], "label": ["1", "2", "3"]}, "2"),
    ):  # fmt: skip
        rows = table(question=["q"], choices=[choices], answer=[answer])
        question = task.questions(rows, task.columns(rows))[0]
        assert question.candidates == ["x", "y", "z"] and question.answer == 1, (choices, answer)
    boolq = table(question=["a", "b"], answer=["true", "false"])
    assert [q.names for q in task.questions(boolq, task.columns(boolq))] == [["false", "true"]] * 2
    refused("row 1: the answer \"w\" is none of the choices x, y", task.columns, table(question=["q"], choices=[["x", "y"]], answer=["w"]))
    refused("row 1: the answer \"answer4\" is none of answer1, answer2, answer3", task.columns, table(instruction=[ARC], answer=["answer4"]))
    refused("has one answer to choose from", task.columns, table(question=["q"], answer=["answer1"]))
    refused('row 1: the choices "a or b" are not a list', task.columns, table(question=["q"], choices=["a or b"], answer=["a"]))


def test_lm_chunks_are_the_text(here):
    (here / "a.txt").write_text("my card was stolen\n\nwhat is the rate\n" * 20)
    task, rows = tasks.get("lm"), load("a.txt")
    examples = task.encode(rows, task.columns(rows), CHAT, None, 32)
    assert all(e["labels"] == e["input_ids"] and 1 < len(e["input_ids"]) <= 32 for e in examples)
    ids = CHAT.encode((here / "a.txt").read_text())
    assert [i for e in examples for i in e["input_ids"]] == ids[: len(ids) - (len(ids) % 32 == 1)]
    documents = task.encode(table(text=["my card", "what"]), {"text": "text"}, CHAT)
    assert CHAT.decode(documents[0]["input_ids"]) == "my card<eos>what<eos>"
    refused("fewer than two tokens", task.encode, table(text=["!"]), {"text": "text"}, CHAT, None, 1)
