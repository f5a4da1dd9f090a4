"""Recipes: what is right is read, what is wrong is named with its place."""

import json

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from tunesmith.errors import TunesmithError
from tunesmith.train import recipe as recipes

GOOD = {"model": "minilm", "data": "tickets.csv"}


@pytest.fixture
def written(tmp_path):
    def write(text):
        (tmp_path / "r.yaml").write_text(text)
        return tmp_path / "r.yaml"

    return write


def refused(match, *args, **kwargs):
    with pytest.raises(TunesmithError, match=match) as caught:
        recipes.load(*args, **kwargs)
    assert "\n" not in str(caught.value)


def test_file_overrides_and_flags_win_in_that_order(written):
    file = written("model: minilm\ndata: a.csv\nlr: 1e-3\nmethod: {method: lora, rank: 4}\n")
    recipe = recipes.load(file, ["method.rank=16", "columns.text=utterance", "eval_every=5"], {"data": "b.csv", "eval": None})
    assert recipe.lr == 1e-3 and recipe.data == "b.csv" and recipe.eval is None
    assert recipe.method == {"method": "lora", "rank": 16} and recipe.columns == {"text": "utterance"} and recipe.eval_every == 5


def test_a_methods_name_opens_into_its_fields():
    assert recipes.load(None, ["method.rank=2"], GOOD).method == {"method": "lora", "rank": 2}
    assert recipes.load(None, ["method=dora", "method.rank=2"], GOOD).method == {"method": "dora", "rank": 2}


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("batchsize: 3", r"r\.yaml, line 3: unknown key 'batchsize' \(did you mean 'batch_size'"),
        ("\nepochs: many", r"line 4: epochs .*integer.*'many'"),
        ("lr: -1", r"line 3: lr should be greater than 0, not -1"),
        ("lr: .inf", r"line 3: lr should be a finite number"),
        ("betas:\n- 0.9\n- 2", r"line 5: betas\.1 should be less than 1, not 2"),
        ("task: classify", r"line 3: task should be 'classification'"),
        ("method: lroa", r"line 3: unknown method 'lroa' \(did you mean 'lora'"),
        ("method:\n  method: lora\n  alpha: 3\n  rnak: 8", r"line 6: .*'rnak' \(did you mean 'rank'"),
        ("method: {method: lora,\n  rank: x}", r"line 4: .*rank"),
        ("seed: 1\nseed: 2", r"line 4: the key 'seed' is there twice"),
        ("a: [", r"r\.yaml, line \d: not YAML"),
        ("optimizer: galor", r"line 3: unknown optimizer 'galor' \(did you mean 'galore'"),
        ("prune: light-pef", r"line 3: unknown prune 'light-pef' \(did you mean 'light-peft'"),
        ("columns: {text: [a]}", r"line 3: columns\.text should be a valid string"),
        ("? [a, b]\n: 1", r"r\.yaml"),
    ],
)
def test_what_is_wrong_is_named_with_its_line(written, text, match):
    refused(match, written(f"model: minilm\ndata: a.csv\n{text}\n"))


@pytest.mark.parametrize(
    ("override", "match"),
    [
        ("lr", "'lr' is not key=value"),
        ("=3", "is not key=value"),
        ("epoch=4", r"epoch=4: unknown key 'epoch' \(did you mean 'epochs'"),
        ("lr.x=4", "lr.x=4: 'lr' holds"),
        ("lr=[1", "lr=\\[1: the value is not YAML"),
        ("method.rank=many", "method.rank=many: .*rank"),
        ("packing=perhaps", "packing=perhaps: packing should be a valid boolean"),
    ],
)
def test_a_wrong_override_is_named(override, match):
    refused(match, None, [override], GOOD | {"lr": 1e-3} if override == "lr.x=4" else GOOD)


def test_files_that_are_no_recipe(tmp_path, written):
    refused("cannot read", tmp_path / "none.yaml")
    refused("a recipe is a mapping", written("- a\n"))
    refused("'model' is missing", written(""))
    (tmp_path / "r.yaml").write_bytes(b"\xff\xfe\x00")
    refused("not UTF-8", tmp_path / "r.yaml")
    (tmp_path / "r.yaml").write_bytes("\ufeffmodel: minilm\ndata: ä.csv\n".encode())
    assert recipes.load(tmp_path / "r.yaml").data == "ä.csv"


def test_the_schema_knows_every_method_and_key():
    schema = recipes.json_schema()
    json.dumps(schema)
    assert set(schema["properties"]) == set(recipes.Recipe.model_fields) and schema["additionalProperties"] is False
    names = schema["properties"]["method"]["anyOf"][0]["enum"]
    assert {"lora", "full", "bitfit"} <= set(names)
    lora = next(m for m in schema["properties"]["method"]["anyOf"] if m.get("properties", {}).get("method") == {"const": "lora"})
    assert "rank" in lora["properties"]


texts = st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=20)


@given(
    st.fixed_dictionaries(
        {"model": texts, "data": texts},
        optional={
            "eval": texts, "columns": st.dictionaries(texts, texts, max_size=3), "lr": st.floats(1e-9, 10), "epochs": st.integers(1, 10**6),
            "betas": st.tuples(st.floats(0, 0.99), st.floats(0, 0.99)), "method": st.sampled_from(["lora", {"method": "lora", "rank": 3}]),
            "output": st.none() | texts, "packing": st.booleans(), "seed": st.integers(0, 2**32 - 1), "early_stop": st.none() | st.integers(1, 9),
        },
    )
)  # fmt: skip
@settings(deadline=None, max_examples=60)
def test_a_dumped_recipe_reads_back_equal(values):
    recipe = recipes.check(values)
    assert recipes.check(yaml.safe_load(recipes.dump(recipe))) == recipe


@given(st.text(max_size=200))
@settings(deadline=None, max_examples=150)
def test_any_text_is_a_recipe_or_one_sentence(tmp_path_factory, text):
    file = tmp_path_factory.getbasetemp() / "any.yaml"
    file.write_text(text, encoding="utf-8", errors="replace")
    with pytest.raises(TunesmithError):
        recipes.load(file)


@given(st.dictionaries(st.sampled_from(["model", "data", *recipes.Recipe.model_fields]), st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | texts, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3), max_leaves=6)))  # fmt: skip
@settings(deadline=None, max_examples=150)
def test_any_values_are_a_recipe_or_one_sentence(values):
    try:
        recipes.check(values)
    except TunesmithError as error:
        assert "\n" not in str(error)


def test_a_list_of_methods(written):
    assert recipes.read_methods(written("- bitfit\n- {method: lora, rank: 4}\n")) == ["bitfit", {"method": "lora", "rank": 4}]
    for text in ("method: lora\n", "- 3\n", ""):
        with pytest.raises(TunesmithError, match="methods are a list"):
            recipes.read_methods(written(text))
