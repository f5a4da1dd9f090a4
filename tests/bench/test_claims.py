"""Experiments are listed with what they found, run on request, and a failing one leaves what is there."""

import json

import pytest
from typer.testing import CliRunner

from tunesmith.bench import claims
from tunesmith.cli import app
from tunesmith.errors import TunesmithError

SCRIPT = '''"""Water is wet (arXiv:0000.00000)."""
from tunesmith.bench.claims import claim, spread
print("working")
claim("Water, arXiv:0000.00000", "water is wet", "100%", "98%", {"water": spread([0.97, 0.98, 0.99])}, 3, holds=True)
claim("Water, arXiv:0000.00000", "water is dry", "0%", "2%", {}, 3, holds=False, limits="one glass")
'''


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "claims").mkdir()
    (tmp_path / "claims" / "water.py").write_text(SCRIPT)
    (tmp_path / "claims" / "fire.py").write_text('"""Fire is hot."""\nraise SystemExit(3)\n')
    (tmp_path / "claims" / "_shared.py").write_text("")
    return tmp_path / "claims"


def test_run_and_list(folder):
    before = claims.results(folder)
    assert [(row["experiment"], row["claim"], row["holds"]) for row in before] == [("fire", "Fire is hot.", None), ("water", "Water is wet (arXiv:0000.00000).", None)]
    told = []
    claims.run(folder, "water", told.append)
    assert [row["holds"] for row in told] == [True, False]
    rows = claims.results(folder, ["water"])
    assert rows == [{"experiment": "water", **row} for row in told]
    assert rows[0]["measured"]["water"] == {"mean": pytest.approx(0.98), "std": pytest.approx(0.01), "runs": [0.97, 0.98, 0.99]}


def test_failure_keeps_what_was_there(folder):
    file = folder.parent / "results" / "claims" / "fire.jsonl"
    file.parent.mkdir(parents=True)
    file.write_text(json.dumps({"claim": "old", "holds": True}) + "\n")
    with pytest.raises(TunesmithError, match="fire ended with code 3"):
        claims.run(folder, "fire", print)
    assert claims.results(folder, ["fire"])[0]["claim"] == "old"


def test_command(folder):
    run = CliRunner().invoke(app, ["claims", "water", "--run", "--folder", str(folder)])
    assert run.exit_code == 0 and "yes" in run.output and "no" in run.output
    listed = CliRunner().invoke(app, ["claims", "--folder", str(folder), "--json"])
    assert [row["holds"] for row in json.loads(listed.stdout)] == [None, True, False]


def test_unknown_names_and_folders(folder, tmp_path):
    with pytest.raises(TunesmithError, match="no experiment 'watr'.*water"):
        claims.results(folder, ["watr"])
    with pytest.raises(TunesmithError, match="checkout"):
        claims.names(tmp_path / "none")
