"""What the small benchmarks share: printing a result and keeping it."""

import json
from pathlib import Path


def keep(result: dict, output: Path | None) -> None:
    text = json.dumps(result, indent=1)
    print(text)
    if output:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(text + "\n")
