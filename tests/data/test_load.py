"""Files as people have them: every shape that is read, and one sentence for every one that is not."""

import gzip
import json
import os
import warnings
from pathlib import Path

import pytest
from datasets import ClassLabel, Dataset, Features, Value
from hypothesis import given, settings
from hypothesis import strategies as st

from tunesmith import data
from tunesmith.errors import TunesmithError

SHARED = Path(os.environ.get("TUNESMITH_DATA") or Path(__file__).resolve().parents[3] / "shared" / "data")
shared = pytest.mark.skipif(not (SHARED / "intents").is_dir(), reason="needs the data sets beside the project")
ROWS = [{"text": "Grüße, €5", "label": "a"}, {"text": 'say "hi"\nthere', "label": "b"}]


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.delenv("TUNESMITH_DATA", raising=False)


def write(name, content):
    Path(name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return name


def refused(match, name, *content, **options):
    if content:
        write(name, *content)
    with pytest.raises(TunesmithError, match=match) as caught:
        data.load(name, **options)
    assert "\n" not in str(caught.value)


def rows(name, **options):
    return data.load(name, **options).to_list()


def test_every_format_gives_the_same_rows(here):
    quoted = '"{}"'.format(ROWS[1]["text"].replace('"', '""'))
    write("a.csv", f'text,label\n"{ROWS[0]["text"]}",a\n{quoted},b\n')
    write("a.tsv", f"text\tlabel\n{ROWS[0]['text']}\ta\n{quoted}\tb\n")
    write("a.json", json.dumps(ROWS))
    write("a.jsonl", "\n\n".join(json.dumps(row) for row in ROWS))
    write("lines.json", "\n".join(json.dumps(row) for row in ROWS))
    write("columns.json", json.dumps({key: [row[key] for row in ROWS] for key in ROWS[0]}))
    write("nested.json", json.dumps({"version": 1, "data": ROWS}))
    Dataset.from_list(ROWS).to_parquet("a.parquet")
    before = set(os.listdir())
    files = [file for file in sorted(before) if Path(file).is_file()]
    assert len(files) == 8 and all(rows(file) == ROWS for file in files)
    assert set(os.listdir()) == before, "nothing is written beside the user's files"
    assert len({data.fingerprint(data.load(file)) for file in files}) == 1
    assert data.fingerprint(data.load("a.csv")) != data.fingerprint(data.load("a.csv", limit=1))


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_marked_encodings(here, encoding):
    write("a.csv", "text,label\r\nGrüße €,a\r\n".encode(encoding))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert rows("a.csv") == [{"text": "Grüße €", "label": "a"}]


@pytest.mark.parametrize(("content", "said", "text"), [(b"Gr\xfc\xdfe \x80", "line 3.*cp1252", "Grüße €"), (b"\xfc\x81", "line 3.*latin-1", "ü\x81")])
def test_unmarked_encodings_are_guessed_and_said(here, content, said, text):
    write("a.csv", b"text,label\nok,a\n" + content + b",b\n")
    with pytest.warns(UserWarning, match=said):
        assert rows("a.csv")[1]["text"] == text


def test_mixed_encodings(here):
    refused("mixes encodings: line 2 is UTF-8 and line 4 is not", "a.csv", "text,label\nGrüße,a\nok,b\n".encode() + b"Gr\xfc\xdfe,b\n")


@pytest.mark.parametrize("delimiter", [";", "|", "\t"])
def test_other_delimiters(here, delimiter):
    write("a.csv", f"text{delimiter}label\nyes, please{delimiter}a\n")
    assert rows("a.csv") == [{"text": "yes, please", "label": "a"}]


def test_csv_oddities_that_are_fine(here):
    write("a.csv", '\n,text,n\n0,"x, y",007\n\n1,NA,1.0\n')
    assert rows("a.csv") == [{"unnamed": "0", "text": "x, y", "n": "007"}, {"unnamed": "1", "text": "NA", "n": "1.0"}]
    write("a.tsv", 'text\tlabel\n"hi\ta\n')
    assert rows("a.tsv") == [{"text": '"hi', "label": "a"}]
    write("a.csv", "text,label\n" + "x" * 200_000 + ",a\n")
    assert len(rows("a.csv")[0]["text"]) == 200_000


def test_files_that_are_refused(here):
    refused("a.csv is empty", "a.csv", "")
    refused("is empty", "a.csv", "\ufeff \n")
    refused("no data rows: only the header text, label", "a.csv", "text,label\n")
    refused("no data rows", "a.json", "[]")
    refused('2 columns called "text"', "a.csv", "text,text,label\na,b,c\n")
    refused("line 5: 3 fields, but the header has 2 .text, label.; a text with a comma needs quotes", "a.csv", 'text,label\n"a\nb",x\n\nyes, no,y\n')
    refused("line 3: 1 fields", "a.csv", "text,label\na,b\nc\n")
    refused("line 3: a quote is opened and never closed", "a.csv", 'text,label\na,b\n"c,d\ne,f\n')
    refused("line 2: not JSON", "a.jsonl", '{"text": "a"}\n{"text": \n')
    refused("line 2: a row is an object", "a.jsonl", '{"text": "a"}\n[1]\n')
    refused("a.json: not JSON", "a.json", "{")
    refused("row 2: a row is an object", "a.json", '[{"text": "a"}, 3]')
    refused("a list of objects, not str", "a.json", '"text"')
    refused("values of different types", "a.json", '[{"a": {"b": 1}}, {"a": [1]}]')
    refused("not a Parquet file", "a.parquet", b"PAR1 or not")
    refused('files of type ".gz" are not read; it can be .csv, .tsv', "a.csv.gz", gzip.compress(b"text"))
    write("tickets.csv", "a,b\n1,2\n")
    refused("no file tickts.csv .did you mean 'tickets.csv'", "tickts.csv")
    refused("limit is 0", "tickets.csv", limit=0)


def test_values_of_several_kinds_become_text(here):
    write("a.json", '[{"a": 1, "b": true}, {"a": "x", "b": null}, {"a": 2.5, "c": [1]}]')
    assert rows("a.json") == [{"a": "1", "b": True, "c": None}, {"a": "x", "b": None, "c": None}, {"a": "2.5", "b": None, "c": [1]}]


def test_class_indices_become_names(here):
    features = Features({"text": Value("string"), "label": ClassLabel(names=["no", "yes"])})
    Dataset.from_dict({"text": ["a", "b", "c"], "label": [1, 0, -1]}, features=features).to_parquet("a.parquet")
    assert [row["label"] for row in rows("a.parquet")] == ["yes", "no", None]


def test_splits_in_one_file_in_a_folder_and_by_name(here, monkeypatch):
    write("a.json", json.dumps({"train": [["x", "p"]], "val": [["y", "q"]], "oos_test": []}))
    assert rows("a.json") == [{"text": "x", "label": "p"}] and rows("a.json", split="validation") == [{"text": "y", "label": "q"}]
    refused("no split \"tset\".*its splits are train, val", "a.json", split="tset")
    Path("store/deep").mkdir(parents=True)
    write("store/deep/cats_train.csv", "text,label\na,b\n")
    write("store/deep/cats_dev.jsonl", '{"text": "c"}')
    write("store/deep/test.csv", "text,label\nt,u\n")
    assert rows("store/deep", split="test") == [{"text": "t", "label": "u"}]
    refused("holds no data file", "store")
    monkeypatch.setenv("TUNESMITH_DATA", "store")
    assert rows("cats")[0]["text"] == "a" and rows("cats", split="val") == [{"text": "c"}]
    refused('cats has no split "test"; its splits are dev, train', "cats", split="test")
    refused('there is no data "catz" .did you mean \'cats\'', "catz")


def test_hub_data(monkeypatch):
    import datasets

    asked = []

    def load_dataset(name, config, download_config):
        asked.append((name, config, download_config.local_files_only))
        if name == "nosuch/data":
            raise FileNotFoundError("Couldn't find it\nanywhere")
        features = Features({"text": Value("string"), "label": ClassLabel(names=["no", "yes"])})
        return datasets.DatasetDict(validation=Dataset.from_dict({"text": ["a"], "label": [1]}, features=features))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert rows("some/data:part", split="val") == [{"text": "a", "label": "yes"}]
    refused('"nosuch/data": it is not a file.*the hub gave none .Couldn\'t find it.$', "nosuch/data")
    refused('some/data has no split "test"; its splits are validation', "some/data", split="test")
    assert asked[:2] == [("some/data", "part", True), ("nosuch/data", None, True)]


def test_a_text_file_is_its_lines(here):
    text = "first\n\nthird\u2028still\r\nlast"
    assert "".join(row["text"] for row in rows(write("a.txt", text))) == text and len(data.load("a.txt")) == 4
    assert rows("a.txt", limit=2) == [{"text": "first\n"}, {"text": "\n"}]


def test_a_limit_is_spread_over_a_sorted_file(here):
    write("a.csv", "text,label\n" + "".join(f"t{i},{i // 10}\n" for i in range(100)))
    assert [row["label"] for row in rows("a.csv", limit=10)] == [str(i) for i in range(10)] and len(rows("a.csv", limit=1000)) == 100


@given(st.lists(st.sampled_from("aaaabbc"), min_size=2, max_size=60), st.floats(0.05, 0.6), st.integers(0, 5))
@settings(max_examples=60, deadline=None)
def test_a_split_is_a_partition_with_every_label_left_in_train(labels, fraction, seed):
    dataset = Dataset.from_dict({"id": list(range(len(labels))), "label": labels})
    train, held = data.split(dataset, fraction, seed, "label")
    again = data.split(dataset, fraction, seed, "label")
    assert sorted([*train["id"], *held["id"]]) == list(range(len(labels))) and list(held["id"]) == list(again[1]["id"]) == sorted(held["id"])
    if len(set(labels)) < len(labels):
        assert set(train["label"]) == set(labels)
    assert abs(len(held) - fraction * len(labels)) <= max(1, len(set(labels)))


def test_a_split_keeps_the_shares_of_labels_and_depends_on_the_seed():
    dataset = Dataset.from_dict({"id": list(range(100)), "label": ["a"] * 80 + ["b"] * 20})
    _, held = data.split(dataset, 0.25, 0, "label")
    assert len(held) == 25 and abs(list(held["label"]).count("b") - 5) <= 1
    assert list(data.split(dataset, 0.25, 1, "label")[1]["id"]) != list(held["id"])
    with pytest.raises(TunesmithError, match="between 0 and 1"):
        data.split(dataset, 1.0, 0)
    with pytest.raises(TunesmithError, match="give an eval file"):
        data.split(dataset.select([0]), 0.5, 0)


def test_so_many_rows_of_each_label():
    dataset = Dataset.from_dict({"id": range(100), "label": ["a"] * 50 + ["b"] * 47 + ["c"] * 3})
    chosen = data.per_label(dataset, 5, "label", seed=1)
    assert [list(chosen["label"]).count(x) for x in "abc"] == [5, 5, 3] and list(chosen["id"]) == sorted(chosen["id"])
    assert list(data.per_label(dataset, 5, "label", seed=2)["id"]) != list(chosen["id"])


def test_the_samples_in_the_package(here):
    assert (len(data.load("contact-centre")), len(data.load("contact-centre", "test"))) == (1680, 504)
    assert (len(data.load("contact-centre-answers")), len(data.load("contact-centre-answers", "test"))) == (600, 120)


def test_a_text_file_is_split_once(here):
    train, held = data.split(data.load(write("a.txt", "".join(f"{i}\n" for i in range(10)))), 0.2, 3)
    assert "".join(train["text"]) + "".join(held["text"]) == Path("a.txt").read_text() and len(held) == 2


@shared
def test_the_data_sets_beside_the_project(monkeypatch):
    monkeypatch.setenv("TUNESMITH_DATA", str(SHARED))
    sizes = {("banking77", "train"): 10003, ("banking77", "test"): 3080, ("gsm8k", "test"): 1319, ("addsub", "test"): 395, ("singleeq", "test"): 508,
             ("aqua", "test"): 254, ("arc_easy", "train"): 2251, ("arc_challenge", "test"): 1172, ("openbookqa", "test"): 500, ("clinc150", "validation"): 3000}  # fmt: skip
    assert {key: len(data.load(*key)) for key in sizes} == sizes
    assert "".join(data.load("tinyshakespeare")["text"]) == (SHARED / "text" / "tinyshakespeare.txt").read_text()
