"""Tiny models and data files as a user would have them; written once for the whole session."""

import csv
import json
import os
import random

import pytest

from tests import tiny

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # also of the processes that tests start: threads that wait for each other spin
SAID = {
    "card": ["my card was stolen", "i lost the card", "the card is blocked", "send a new card please"],
    "rate": ["what is the exchange rate", "the rate for euro", "exchange rate today", "how good is the rate"],
    "top_up": ["how do i top up", "my top up failed", "top up with cash", "can i top up now"],
}


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    """Folder of one tiny model of each kind: models["bert"]."""
    root = tmp_path_factory.mktemp("models")
    return {kind: str(tiny.save_tiny(root / kind, kind)) for kind in ("llama", "gpt2", "bert")}


def messages(n: int, seed=0) -> list[tuple[str, str]]:
    """(text, intent) pairs of very different lengths."""
    draw = random.Random(seed)
    labels = [list(SAID)[i % 3] for i in range(n)]
    return [(draw.choice(SAID[label]) + " please" * draw.randrange(6), label) for label in labels]


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """Data files: data["tickets"] and data["more"] (classification), data["sums"] (prompt, response), data["prose"] (text)."""
    root = tmp_path_factory.mktemp("data")
    for name, n, seed in (("tickets", 96, 0), ("more", 24, 1)):
        with (root / f"{name}.csv").open("w", newline="") as file:
            csv.writer(file).writerows([("text", "label"), *messages(n, seed)])
    rows = [{"prompt": f"what is {i % 5} + {i % 3}?", "response": str(i % 5 + i % 3) + "!" * (i % 7)} for i in range(40)]
    (root / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (root / "prose.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text, _ in messages(60)))
    return {"tickets": str(root / "tickets.csv"), "more": str(root / "more.csv"), "sums": str(root / "sums.jsonl"), "prose": str(root / "prose.jsonl")}


@pytest.fixture
def here(tmp_path, monkeypatch):
    """The test runs in an empty folder of its own."""
    monkeypatch.chdir(tmp_path)
    return tmp_path
