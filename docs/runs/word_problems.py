"""Word problems to train on for AddSub: the 200 shortest of GSM8K, and those of SingleEq that are unlike every one of AddSub.

    python docs/runs/word_problems.py ../shared/data/math problems.jsonl

SingleEq and AddSub share questions. One of SingleEq is left out when, numbers aside, it has 60% of its words in common with
one of AddSub, or when its worked answer does not end in the right number.
"""

import json
import re
import sys
from pathlib import Path


def words(question):
    return set(re.sub(r"[^a-z]+", " ", question.lower()).split())


def main(folder, output):
    gsm8k = [json.loads(line) for line in (folder / "gsm8k_train.jsonl").read_text(encoding="utf-8").split("\n") if line]
    rows = sorted(gsm8k, key=lambda row: len(row["question"]) + len(row["answer"]))[:200]
    tested = [words(row["instruction"]) for row in json.loads((folder / "addsub_test.json").read_text(encoding="utf-8"))]
    for row in json.loads((folder / "singleeq_test.json").read_text(encoding="utf-8")):
        own, answer = words(row["instruction"]), f"{float(row['answer']):g}"
        steps, _, last = row["output"].strip().removeprefix("A:").strip().rpartition("The answer is ")
        if steps and last.rstrip(".") == answer and max(len(own & other) / len(own | other) for other in tested) < 0.6:
            rows.append({"question": row["instruction"].strip(), "answer": f"{steps.strip()}\n#### {answer}"})
    output.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    print(f"{len(rows)} problems in {output}")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
