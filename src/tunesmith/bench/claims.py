"""Papers' claims as experiments: each is a script that prints one JSON line per claim; what they printed is kept beside them."""

import json
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ..errors import TunesmithError, nearest
from ..files import atomic_write
from ..train.folder import read_rows


def claim(paper: str, claim: str, reported: str, summary: str, measured: dict[str, Any], seeds: int, holds: bool, limits: str = "") -> None:
    """Print one result.

    paper: name and arXiv number. claim: the sentence that is tested. reported: the paper's figure. summary: what was measured, in
    a few words. measured: the numbers, for each side {"mean", "std", "runs"} of `spread`. limits: what this scale cannot show.
    """
    print(json.dumps(dict(paper=paper, claim=claim, reported=reported, summary=summary, measured=measured, seeds=seeds, holds=bool(holds), limits=limits)), flush=True)


def spread(runs: Sequence[float]) -> dict[str, Any]:
    """Mean, standard deviation and the runs themselves."""
    return {"mean": statistics.mean(runs), "std": statistics.stdev(runs) if len(runs) > 1 else 0.0, "runs": list(runs)}


def verdict(row: dict) -> str:
    return "not measured" if row["holds"] is None else "yes" if row["holds"] else "no"


def names(folder: Path) -> list[str]:
    """The experiments in `folder`. Raises `TunesmithError` where there are none."""
    found = sorted(p.stem for p in folder.glob("*.py") if not p.stem.startswith("_")) if folder.is_dir() else []
    if not found:
        raise TunesmithError(f"there are no experiments in {folder}; run this in a checkout of tunesmith, or say --folder")
    return found


def results(folder: Path, wanted: list[str] | None = None) -> list[dict]:
    """Every claim of the experiments; one line with holds=None for an experiment that was never run."""
    rows = []
    for name in _known(folder, wanted):
        file = _file(folder, name)
        rows += [{"experiment": name, **row} for row in read_rows(file)] or [{
            "experiment": name, "paper": "", "claim": _title(folder / f"{name}.py"), "reported": "", "summary": "", "measured": {}, "seeds": 0, "holds": None, "limits": "",
        }]  # fmt: skip
    return rows


def run(folder: Path, name: str, tell: Callable[[dict], None]) -> None:
    """Run one experiment and keep what it prints. Raises `TunesmithError` where it fails; the results before then stay."""
    (name,) = _known(folder, [name])
    lines = []
    with subprocess.Popen([sys.executable, str(folder / f"{name}.py")], stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            if line.startswith("{"):
                lines.append(line.strip())
                tell(json.loads(line))
    if process.returncode or not lines:
        raise TunesmithError(f"the experiment {name} ended with code {process.returncode} and {len(lines)} results")
    atomic_write(_file(folder, name), "\n".join(lines) + "\n")


def _known(folder: Path, wanted: list[str] | None) -> list[str]:
    there = names(folder)
    for name in wanted or []:
        if name not in there:
            raise TunesmithError(f"there is no experiment {name!r}{nearest(name, there) or '; there are ' + ', '.join(there)}")
    return wanted or there


def _file(folder: Path, name: str) -> Path:
    return folder.parent / "results" / "claims" / f"{name}.jsonl"


def _title(script: Path) -> str:
    return script.read_text(encoding="utf-8").lstrip('"').splitlines()[0].rstrip('"')
