"""The commands as a user or a program runs them."""

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification

from tests import tiny
from tunesmith import cli

torch.set_num_threads(1)
SOURCE = str(Path(cli.__file__).parents[1])


@pytest.fixture
def command(capsys, monkeypatch):
    """Run a command in this process: command("methods") is (exit code, standard output, standard error)."""

    def call(*arguments, stdin=""):
        monkeypatch.setattr(sys, "argv", ["tunesmith", *map(str, arguments)])
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        before = signal.getsignal(signal.SIGINT)
        code = 0
        try:
            cli.main()
        except SystemExit as end:
            code = end.code or 0
        finally:
            signal.signal(signal.SIGINT, before)
        out, err = capsys.readouterr()
        return code, out, err

    return call


def spawn(*arguments, **options):
    env = os.environ | {"PYTHONPATH": os.pathsep.join([SOURCE, os.environ.get("PYTHONPATH", "")]), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "tunesmith", *map(str, arguments)],
        env=env, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options,
    )  # fmt: skip


def test_a_user_walks_from_a_file_to_a_merged_model(here, models, data, command):
    """The whole way in real processes first, then every other command on the run it left."""
    process = spawn("train", "--data", data["tickets"], "--model", models["bert"], "--method", "lora", "epochs=2", "method.rank=4", "--output", "run")
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert "text from column 'text', label from column 'label'" in err and "parameters train" in err and "tokens/s" in err and "accuracy" in err
    assert "accuracy" in out and "report  run/report.html" in out and (here / "run" / "report.html").exists()

    code, out, _ = command("eval", "run", "--data", data["more"], "--json", "--output", "scored.jsonl")
    metrics = json.loads(out)
    rows = [json.loads(line) for line in (here / "scored.jsonl").read_text().splitlines()]
    assert code == 0 and metrics["accuracy"] == sum(row["correct"] for row in rows) / 24
    assert command("eval", "run", "--data", data["more"])[1].splitlines()[0].split() == ["metric", "value"]

    code, one, _ = command("predict", "run", "my card was stolen")
    assert code == 0 and one.strip() in ("card", "rate", "top_up")
    code, out, _ = command("predict", "run", "-", "--json", stdin="my card was stolen\nthe exchange rate\n")
    answers = [json.loads(line) for line in out.splitlines()]
    assert len(answers) == 2 and answers[0]["predicted"] == one.strip() and 0 < answers[0]["score"] <= 1
    code, _, err = command("predict", "run", "--data", data["more"], "--output", "answers.jsonl")
    assert code == 0 and "24 answers" in err
    assert [json.loads(line)["predicted"] for line in (here / "answers.jsonl").read_text().splitlines()] == [row["predicted"] for row in rows]

    code, out, _ = command("merge", "run", "merged", "--json")
    assert code == 0 and json.loads(out)["max_error"] < 1e-5
    plain = AutoModelForSequenceClassification.from_pretrained(here / "merged")
    assert type(plain).__module__.startswith("transformers") and plain.config.id2label == {0: "card", 1: "rate", 2: "top_up"}
    assert not any("tunesmith" in name for name in load_file(here / "merged" / "model.safetensors"))

    code, out, _ = command("export", "run", "adapter", "--format", "peft")
    assert code == 0 and {p.name for p in (here / "adapter").iterdir()} >= {"adapter_config.json", "adapter_model.safetensors"}
    code, _, err = command("export", "run", "other", "--format", "pefd")
    assert code == 2 and "did you mean 'peft'" in err
    code, _, err = command("merge", "run", "merged")
    assert code == 2 and err == "error: merged exists already; choose a new folder\n"
    code, _, err = command("chat", "run")
    assert code == 2 and "tunesmith predict run" in err

    code, _, err = command("train", "--data", data["tickets"], "--model", models["bert"], "--output", "run")
    assert code == 2 and "run exists" in err
    code, out, err = command("train", "run", "--resume", "--json")
    assert code == 0 and err == "" and json.loads(out)["folder"] == "run"


def test_a_generative_run_talks(here, models, data, command):
    code, out, err = command("train", "--data", data["sums"], "--model", models["llama"], "--method", "prefix-tuning", "max_steps=2", "max_new_tokens=4", "-q")
    assert (code, out, err) == (0, "", "")
    run = next((here / "runs").iterdir())
    assert run.name == "llama-prefix-tuning-sft"
    code, out, _ = command("chat", run, "--max-new-tokens", 3, stdin="hello\n/reset\n\nand you?\n/quit\nnever read\n")
    assert code == 0 and len(out.splitlines()) >= 2
    assert command("chat", models["gpt2"], "--max-new-tokens", 3, stdin="hello\n")[0] == 0
    assert command("predict", run, "what is 1 + 1?", "--json")[0] == 0
    code, out, _ = command("eval", models["llama"], "--data", data["sums"], "--task", "sft", "--limit", 3, "--json")
    assert code == 0 and json.loads(out)["perplexity"] > 1
    code, _, err = command("merge", run, "merged")
    assert code == 2 and "cannot be merged" in err and err.count("\n") == 1 and not (here / "merged").exists()


def test_a_tied_head_stays_what_the_adapter_saw(here, data, command):
    """The embedding trains and the head tied to it does not: the merged folder must not tie them again."""
    tiny.save_tiny(here / "tied", "llama", tie=True)
    recipe = "method={method: lora, targets: [embed_tokens, q_proj]}"
    assert command("train", recipe, "--data", data["sums"], "--model", "tied", "epochs=2", "lr=0.05", "max_new_tokens=2", "--output", "run", "-q")[0] == 0
    code, out, _ = command("merge", "run", "merged", "--json")
    assert code == 0 and json.loads(out)["max_error"] < 1e-4
    assert not json.loads((here / "merged" / "config.json").read_text())["tie_word_embeddings"]


def test_a_damaged_adapter_or_another_base_is_refused(here, data, command):
    tiny.save_tiny(here / "base", "bert")
    assert command("train", "--data", data["tickets"], "--model", "base", "max_steps=1", "--output", "run", "-q")[0] == 0
    file = here / "run" / "adapter" / "adapter.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    code, out, err = command("predict", "run", "text")
    assert (code, out) == (2, "") and err.startswith("error: ") and err.count("\n") == 1
    file.write_bytes(whole)
    assert command("predict", "run", "text")[0] == 0
    tiny.save_tiny(here / "base", "bert", hidden=64)
    code, _, err = command("predict", "run", "text")
    assert code == 2 and err.count("\n") == 1
    shutil.rmtree(here / "run" / "adapter")
    code, _, err = command("merge", "run", "merged")
    assert code == 2 and "tunesmith train run --resume" in err


def test_compare_makes_one_table(here, models, data, command):
    (here / "methods.yaml").write_text("- {method: lora, rank: 2}\n- bitfit\n")
    code, out, err = command("compare", "--data", data["tickets"], "--model", models["bert"], "--methods", "methods.yaml", "epochs=1", "--output", "both")
    assert code == 0, err
    assert out.splitlines()[0].split()[:2] == ["method", "accuracy"] and len(out.splitlines()) == 4
    assert {"compare.json", "compare.csv", "compare.html"} <= {p.name for p in (here / "both").iterdir()}


def test_what_matches_is_shown(models, command):
    code, out, err = command("targets", models["llama"], "--method", "lora", "--targets", "q_proj", "--targets", "v_prj", "--json")
    rows = json.loads(out)
    assert code == 0 and [row["path"] for row in rows] == [f"model.layers.{i}.self_attn.q_proj" for i in (0, 1)]
    assert rows[0] == {"path": rows[0]["path"], "type": "Linear", "shape": [32, 32], "method": "lora", "trainable": 8 * 64}
    assert err.startswith("warning: target 'v_prj'") and "v_proj" in err
    code, out, _ = command("targets", models["bert"])
    assert code == 0 and "encoder.layer.0.attention.self.query" in out and "trained parameters" in out
    code, _, err = command("targets", models["llama"], "--targets", "nothing")
    assert code == 2 and err.startswith("error: target 'nothing'")
    assert command("targets", models["llama"], "--method", "prompt-tuning")[0] == 0


def test_the_methods_and_the_schema_for_programs(command):
    code, out, _ = command("methods", "--json")
    listed = {row["name"]: row for row in json.loads(out)}
    assert code == 0 and listed["lora"]["mergeable"] and not listed["prefix-tuning"]["mergeable"]
    code, out, _ = command("methods")
    assert code == 0 and len(out.splitlines()) == len(listed) + 1
    assert json.loads(command("schema")[1])["properties"]["epochs"]["default"] == 3


def test_help_is_quick_and_shows_an_example(command):
    code = "import sys, tunesmith.cli; sys.exit(bool({'torch', 'transformers', 'pydantic', 'datasets'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": SOURCE}).returncode == 0
    _, out, _ = command("--help")
    names = ["methods", "schema", "train", "eval", "predict", "chat", "merge", "export", "targets", "compare"]
    for name in names:
        assert f"  {name} " in out
        code, text, _ = command(name, "--help")
        assert code == 0 and "Example" in text and f"tunesmith {name}" in text


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (["train", "none.yaml"], "there is no recipe none.yaml"),
        (["train", "a.yaml", "b.yaml"], "one recipe at a time"),
        (["train", "--data", "x.csv"], "'model' is missing"),
        (["train", "--data", "x.csv", "--model", "minilm"], "there is no file x.csv"),
        (["train", "--data", "x.csv", "--model", "minilm", "epoch=3"], "epoch=3: unknown key 'epoch' (did you mean 'epochs'"),
        (["train", "--data", "x.csv", "--model", "minilm", "--method", "lroa"], "--method: unknown method 'lroa' (did you mean 'lora'"),
        (["train", "r.yaml"], "r.yaml, line 2: unknown key 'date' (did you mean 'data'"),
        (["train", "empty", "--resume"], "cannot read empty/recipe.yaml"),
        (["eval", "empty", "--data", "x.csv"], "there is no file x.csv"),
        (["predict", "empty", "text"], "empty is not a run folder"),
        (["predict", "empty"], "either a text"),
        (["merge", "empty", "out"], "not a run folder"),
        (["export", "empty", "out"], "not a run folder"),
        (["chat", "empty"], "config.json is missing"),
        (["targets", "empty"], "config.json is missing"),
        (["compare", "--data", "x.csv", "--model", "minilm", "--seeds", "one"], "seeds are whole numbers"),
        (["compare", "--data", "x.csv", "--model", "minilm", "--methods", "no.yaml"], "cannot read no.yaml"),
        (["compare", "--data", "x.csv", "--model", "minilm", "--rates", "1x,fast"], "rates are numbers"),
        (["compare", "--data", "x.csv", "--model", "minilm", "--methods", "lora,bitfat"], "unknown method 'bitfat' (did you mean 'bitfit'"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(here, command, arguments, match):
    (here / "empty").mkdir()
    (here / "r.yaml").write_text("model: minilm\ndate: x.csv\n")
    code, out, err = command(*arguments)
    assert (code, out) == (2, "") and err.startswith("error: ") and err.count("\n") == 1 and match in err
    assert {p.name for p in here.iterdir()} == {"empty", "r.yaml"} and not any((here / "empty").iterdir())


def test_ctrl_c_says_how_to_go_on(here, models, data):
    process = spawn("train", "--data", data["tickets"], "--model", models["bert"], "epochs=1000", "--output", "run")
    deadline = time.monotonic() + 100
    while not (here / "run" / "checkpoint" / "state.pt").exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "stopped; go on with: tunesmith train run --resume" in err and "Traceback" not in err
