"""Comparisons: the front is a front, nothing is trained twice, and one failure does not cost the rest."""

import csv
import json
import statistics
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tunesmith.bench.compare import compare, pareto
from tunesmith.errors import TunesmithError
from tunesmith.train import recipe as recipes

coordinate = st.integers(0, 8) | st.floats(-10, 10)


def beats(a, b):
    return a[0] <= b[0] and a[1] >= b[1] and a != b


@given(st.lists(st.tuples(coordinate, coordinate), max_size=30))
def test_pareto(points):
    front = pareto(points)
    members = [points[i] for i in front]
    assert len(set(front)) == len(front) and members == sorted(members)
    assert not any(beats(point, member) for member in members for point in points)
    for i, point in enumerate(points):
        if i not in front:
            assert any(beats(member, point) for member in members)


def test_pareto_of_one_and_of_equals():
    assert pareto([]) == []
    assert pareto([(1, 1)]) == [0]
    assert pareto([(1, 1), (1, 1), (2, 1)]) == [0, 1]


MEASURED = {"full": (0.95, 1000, 90.0), "lora": (0.945, 100, 60.0), "bitfit": (0.80, 10, 50.0), "ia3": (0.70, 20, 55.0)}


@pytest.fixture
def trained(monkeypatch):
    """The requests to train, answered with made-up runs; `ia3` on seed 13 fails."""
    requests = []

    def train(fields, tell, jobs, children):
        requests.append(fields)
        recipe = recipes.check(fields)
        name = recipe.method if isinstance(recipe.method, str) else recipe.method["method"]
        folder = Path(recipe.output)
        folder.mkdir(exist_ok=True)
        if (name, recipe.seed) == ("ia3", 13):
            return "the loss is no longer a number at step 3"
        value, parameters, time = MEASURED[name]
        value = None if recipe.holdout == 0 else value + recipe.seed / 1000
        summary = {
            "method": name, "model": "minilm", "task": "classification", "metric": "accuracy", "higher_is_better": True, "best": value,
            "params": {"trainable": parameters, "total": 1000, "percent": parameters / 10, "bytes": 4 * parameters},
            "time_s": 2 * time, "train_s": time, "peak_mb": 500 + parameters, "steps": 30, "epochs": 3.0, "base_metrics": {"accuracy": 0.5},
        }  # fmt: skip
        (folder / "summary.json").write_text(json.dumps(summary))
        (folder / "metrics.jsonl").write_text('{"step": 1, "tokens_per_s": 100.0}\n{"step": 2, "tokens_per_s": 300.0}\n{"step": 3, "tokens_per_s": 110.0}\n')
        return None

    monkeypatch.setattr("tunesmith.bench.compare._train", train)
    return requests


@pytest.fixture
def base(tmp_path):
    (tmp_path / "d.csv").write_text("text,label\na,x\n")
    return {"model": "minilm", "data": str(tmp_path / "d.csv"), "epochs": 3}


def test_table_files_and_fronts(tmp_path, base, trained):
    out = tmp_path / "out"
    result = compare(["full", "lora", "bitfit", "ia3"], base, out)
    assert [row["label"] for row in result["rows"]] == ["full", "lora", "bitfit", "ia3"]
    assert result["fronts"] == dict.fromkeys(("trainable", "train_s", "peak_mb"), ["bitfit", "lora", "full"])
    assert result["untouched"] == 0.5 and result["failures"] == []
    assert json.loads((out / "compare.json").read_text()) == result
    table = list(csv.DictReader((out / "compare.csv").open()))
    assert [(row["method"], float(row["accuracy"]), int(row["trainable"])) for row in table] == [(m, v, p) for m, (v, p, _) in MEASURED.items()]
    assert {row["tokens_per_s"] for row in table} == {"110.0"}
    html = (out / "compare.html").read_text()
    assert html.count("<svg") == 3 and 'href="lora/report.html"' in html
    assert "Best accuracy: full, 0.950. Within 1 % of it with the fewest parameters: lora, 0.945, 10.00 % of the model trained." in html
    assert html.count('class="number best"') == 6  # one for each measure but the speed, which is the same for all, and the epochs


def test_what_is_finished_is_not_trained_again(tmp_path, base, trained):
    compare(["lora"], base, tmp_path / "out")
    result = compare(["lora", "bitfit"], recipes.check(base), tmp_path / "out")
    assert [request["method"] for request in trained] == ["lora", "bitfit"]
    assert len(result["rows"]) == 2


def test_what_was_cut_off_goes_on_where_it_was(tmp_path, base, trained):
    compare(["lora"], base, tmp_path / "out")
    (tmp_path / "out" / "lora" / "summary.json").unlink()
    (tmp_path / "out" / "lora" / "checkpoint").mkdir()
    compare(["lora"], base, tmp_path / "out")
    assert len(trained) == 2 and (tmp_path / "out" / "lora" / "checkpoint").exists()


def test_another_recipe_or_other_data_is_refused_before_anything_is_lost(tmp_path, base, trained):
    compare(["lora"], base, tmp_path / "out")
    with pytest.raises(TunesmithError, match="epochs was 3 and is 2"):
        compare(["bitfit", "lora"], base | {"epochs": 2}, tmp_path / "out")
    Path(base["data"]).write_text("text,label\nb,x\n")
    with pytest.raises(TunesmithError, match="its data have changed"):
        compare(["lora"], base, tmp_path / "out")
    assert len(trained) == 1
    (tmp_path / "out" / "lora" / "left").touch()
    compare(["lora"], base, tmp_path / "out", overwrite=True)
    assert len(trained) == 2 and not (tmp_path / "out" / "lora" / "left").exists()


def test_a_folder_of_something_else_is_left_alone(tmp_path, base, trained):
    (tmp_path / "out" / "lora").mkdir(parents=True)
    (tmp_path / "out" / "lora" / "thesis.tex").touch()
    with pytest.raises(TunesmithError, match="is not of a comparison"):
        compare(["lora"], base, tmp_path / "out", overwrite=True)
    assert (tmp_path / "out" / "lora" / "thesis.tex").exists()


def test_one_failure_does_not_lose_the_others(tmp_path, base, trained):
    events = []
    result = compare(["ia3", "lora"], base | {"seed": 13}, tmp_path / "out", progress=events.append)
    assert [row["label"] for row in result["rows"]] == ["lora"]
    assert result["failures"] == [{"label": "ia3", "reason": "the loss is no longer a number at step 3"}]
    assert "no longer a number" in (tmp_path / "out" / "compare.html").read_text()
    assert [event["text"] for event in events] == ["ia3 (1 of 2)", "lora (2 of 2)"]


def test_nothing_but_failures(tmp_path, base, trained):
    assert compare(["ia3"], base | {"seed": 13}, tmp_path / "out")["rows"] == []
    assert "no longer a number" in (tmp_path / "out" / "compare.html").read_text()


def test_without_evaluation_there_is_the_cost(tmp_path, base, trained):
    result = compare(["lora", "full"], base | {"holdout": 0}, tmp_path / "out")
    assert [row["value"] for row in result["rows"]] == [None, None]
    html = (tmp_path / "out" / "compare.html").read_text()
    assert "<svg" not in html and "1 min 30 s" in html


def test_seeds_give_mean_and_deviation(tmp_path, base, trained):
    result = compare(["lora", {"method": "lora", "rank": 2}], base, tmp_path / "out", seeds=[1, 2, 6])
    row = result["rows"][0]
    values = [0.946, 0.947, 0.951]
    assert row["value"] == pytest.approx(statistics.mean(values)) and row["spread"] == pytest.approx(statistics.stdev(values))
    assert [run["folder"] for run in result["rows"][1]["runs"]] == [f"lora-rank-2-seed-{seed}" for seed in (1, 2, 6)]
    assert "0.948 ± 0.003" in (tmp_path / "out" / "compare.html").read_text()


def test_text_is_text(tmp_path, base, trained):
    compare([{"method": "lora", "targets": ["<script>alert(1)</script>"]}], base | {"seed": 7}, tmp_path / "out")
    html = (tmp_path / "out" / "compare.html").read_text()
    assert html.count("<script") == 1 and "&lt;script&gt;alert(1)" in html


def test_bad_input_stops_before_the_first_run(tmp_path, base, trained):
    for methods, said in ((["lora", "loar"], "lora"), (["lora", "lora"], "twice"), ([], "at least one")):
        with pytest.raises(TunesmithError, match=said):
            compare(methods, base, tmp_path / "out")
    with pytest.raises(TunesmithError, match="epoks"):
        compare(["lora"], base | {"epoks": 3}, tmp_path / "out")
    assert not trained and not (tmp_path / "out").exists()


def test_a_method_trains_in_a_process_of_its_own(tmp_path):
    """The real loop, on a tiny model."""
    from tests.tiny import save_tiny

    rows = [f"{word} number {i},{label}\n" for i in range(12) for word, label in (("card", "x"), ("rate", "y"))]
    (tmp_path / "d.csv").write_text("text,label\n" + "".join(rows))
    base = {"model": str(save_tiny(tmp_path / "model", "bert")), "data": str(tmp_path / "d.csv"), "max_steps": 2, "device": "cpu", "log_every": 1}
    events = []
    result = compare(["lora"], base, tmp_path / "out", progress=events.append)
    assert result["failures"] == []
    (row,) = result["rows"]
    assert row["steps"] == 2 and row["peak_mb"] > 0 and row["tokens_per_s"] > 0 and 0 <= row["value"] <= 1
    assert (tmp_path / "out" / "lora" / "report.html").exists()
    assert [event["step"] for event in events if event["event"] == "log"] == [1, 2]


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        ("""cat > /dev/null; echo '{"event": "failure", "text": "the file is empty"}'""", "the file is empty"),
        ("kill -9 $$", "the process was killed by signal 9 (9: most often out of memory)"),
        ("exit 3", "the process ended with code 3"),
    ],
)
@pytest.mark.skipif(sys.platform == "win32", reason="the stand-in for the process is a shell script")
def test_a_process_that_fails_says_why(tmp_path, base, monkeypatch, script, reason):
    child = tmp_path / "child"
    child.write_text(f"#!/bin/sh\n{script}\n")
    child.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(child))
    assert compare(["lora"], base, tmp_path / "out")["failures"] == [{"label": "lora", "reason": reason}]


def test_each_method_at_the_best_of_some_rates(tmp_path, base, trained, monkeypatch):
    best = {"lora": 2e-3, "bitfit": 8e-3}
    monkeypatch.setitem(MEASURED, "lora", (0.9, 100, 60.0))
    plain = sys.modules["tunesmith.bench.compare"]._train

    def train(fields, tell, jobs, children):
        name = fields["method"]["method"]
        value, parameters, time = MEASURED[name]
        monkeypatch.setitem(MEASURED, name, (value - 100 * abs(fields["lr"] - best.get(name, 5e-4)), parameters, time))
        try:
            return plain(fields, tell, jobs, children)
        finally:
            monkeypatch.setitem(MEASURED, name, (value, parameters, time))

    monkeypatch.setattr("tunesmith.bench.compare._train", train)
    (tmp_path / "test.csv").write_text("text,label\na,x\n")
    methods = ["lora", "bitfit", {"method": "full", "lr": 1e-5}]
    result = compare(methods, base | {"test": str(tmp_path / "test.csv")}, tmp_path / "out", seeds=[3, 4], rates=[5e-4, 2e-3, 8e-3])
    assert [row["method"]["lr"] for row in result["rows"]] == [2e-3, 8e-3, 1e-5]
    tuning = [request for request in trained if "rates" in request["output"]]
    assert len(tuning) == 6 and all("test" not in request and request["seed"] == 3 for request in tuning)
    assert len(trained) == 6 + 3 * 2 and all("test" in request for request in trained if "rates" not in request["output"])
    compare(methods, base | {"test": str(tmp_path / "test.csv")}, tmp_path / "out", seeds=[3, 4], rates=[5e-4, 2e-3, 8e-3])
    assert len(trained) == 12
    result = compare(["lora"], base, tmp_path / "relative", rates=["0.5x", "2x"])
    assert [row["method"]["lr"] for row in result["rows"]] == [2e-3]


def test_of_rates_that_do_equally_well_the_one_of_the_lowest_loss(tmp_path, base, trained, monkeypatch):
    plain = sys.modules["tunesmith.bench.compare"]._train

    def train(fields, *rest):
        failure, file = plain(fields, *rest), Path(fields["output"]) / "summary.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"eval": {"loss": abs(fields["lr"] - 2e-3)}}))
        return failure

    monkeypatch.setattr("tunesmith.bench.compare._train", train)
    assert compare(["lora"], base, tmp_path / "out", rates=[5e-4, 2e-3, 8e-3])["rows"][0]["method"]["lr"] == 2e-3


def test_runs_side_by_side_give_the_same_table(tmp_path, base, trained):
    told = []
    one = compare(["full", "lora", "bitfit", "ia3"], base, tmp_path / "one")
    two = compare(["full", "lora", "bitfit", "ia3"], base, tmp_path / "two", progress=told.append, jobs=3)
    assert two == one and {event["event"] for event in told} == {"note"}
