"""S2-LoRA is as good as AdaLoRA in its domain with far fewer parameters, and better out of it.

    python benchmarks/claims/s2_lora.py

Out of the domain stands the test set as a poor speech recogniser would have it, in place of the paper's other groups of
speakers: lower case without punctuation, one word in eight lost and one in eight said twice. Nothing of the kind is trained on.
"""

import csv
import random
import re

from _common import FOLDER, LIMITS, about, above, accuracies, few_shot, parameters, percent, spread, values

from tunesmith import data
from tunesmith.bench.claims import claim
from tunesmith.train.predict import evaluate_on

SIDES = {"s2-lora": {"method": "s2-lora", "rank": 32}, "adalora": {"method": "adalora", "rank": 12, "target_rank": 8}}
PAPER = "S2-LoRA (arXiv 2309.09443)"
SPOKEN = FOLDER / "spoken.csv"


def misheard(text: str, chance: random.Random) -> str:
    words = re.sub(r"[^a-z0-9' ]", "", text.lower()).split()
    return " ".join(word for word in words for _ in range(chance.choice([0, 1, 1, 1, 1, 1, 1, 2]))) or text.lower()


def write_spoken() -> None:
    chance = random.Random(0)
    with SPOKEN.open("w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        rows.writerow(["text", "category"])
        rows.writerows([misheard(row["text"], chance), row["category"]] for row in data.load("banking77", "test"))


def main():
    rows = few_shot(SIDES, runs=True)
    write_spoken()
    inside = {name: values(row) for name, row in rows.items()}
    outside = {name: [evaluate_on(FOLDER / run["folder"], SPOKEN).metrics["accuracy"] for run in row["runs"]] for name, row in rows.items()}
    share = parameters(SIDES["s2-lora"]) / parameters(SIDES["adalora"])
    claim(
        PAPER,
        "S2-LoRA is as good as AdaLoRA in its domain with far fewer parameters",
        "comparable in domain with 0.02% of Whisper trained (abstract)",
        f"test accuracy with {share:.2f} of the parameters: " + ", ".join(f"{name} {percent(each)}" for name, each in inside.items()),
        accuracies(rows),
        3,
        about(inside["s2-lora"], inside["adalora"]),
        LIMITS + "; as good means no more than one point below",
    )
    claim(
        PAPER,
        "S2-LoRA is better than AdaLoRA out of its domain",
        "better out of domain on children's speech of another corpus (abstract)",
        "accuracy on misheard texts: " + ", ".join(f"{name} {percent(each)}" for name, each in outside.items()),
        {name: spread(each) for name, each in outside.items()},
        3,
        above(outside["s2-lora"], outside["adalora"]),
        LIMITS + "; texts with words lost and doubled stand for another group of speakers",
    )


if __name__ == "__main__":
    main()
