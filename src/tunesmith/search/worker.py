"""One of the workers of a search: it takes a configuration, trains it, says what came out, and goes on while there is something left."""

import hashlib
import json
import math
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import TrialState

from ..bench.compare import train_in_child
from ..errors import TunesmithError
from .sampler import HypervolumeSampler, names
from .space import Point, Space

FAILURES = 5  # trials of a worker one after another, after which it gives up
WAIT = 2  # seconds between looks at what other workers have done


class TrialFailed(Exception):
    """A configuration that could not be trained."""


@dataclass
class Worker:
    """tried: the recipe of a trial but for its method; contents: the digest of its data; trials: finished ones of all workers together."""

    study: optuna.Study
    sampler: HypervolumeSampler
    space: Space
    tried: dict
    contents: str
    output: Path
    metric: str
    cost: str
    depth: int
    trials: int
    tell: Callable[[dict], None]
    failed: list[str] = field(default_factory=list)  # why the last trials of this worker failed, since one did not

    def run(self) -> None:
        """Until `trials` are finished or the space has no more points; waits for other workers' last trials."""
        waited = False
        while (what := self._next()) != "done":
            if what == "try":
                self._try()
                continue
            if not waited:
                self.tell({"event": "note", "text": "waiting for the last trials of other workers, or for those without a sign of life to be taken up again"})
            waited = True
            time.sleep(WAIT)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)  # heartbeats
                optuna.storages.fail_stale_trials(self.study)
        if not self._complete():
            raise TunesmithError(f"no configuration of the space could be trained{'; the last one failed with: ' + self.failed[-1] if self.failed else ''}")

    def _complete(self) -> int:
        return sum(t.state == TrialState.COMPLETE for t in self.study.get_trials(deepcopy=False))

    def _next(self) -> str:
        """try another configuration, wait for those that others are at, or done."""
        known = self.study.get_trials(deepcopy=False)
        waiting, running, complete = (sum(t.state == state for t in known) for state in (TrialState.WAITING, TrialState.RUNNING, TrialState.COMPLETE))
        left = waiting or len(self.sampler.tried(known)) < self.space.size(self.depth)
        if complete >= self.trials or not (left or running):
            return "done"
        return "wait" if running and (not left or complete + running >= self.trials) else "try"

    def _try(self) -> None:
        own: list[optuna.Trial] = []

        def objective(trial: optuna.Trial) -> tuple[float, float]:
            own.append(trial)
            return self._objective(trial)

        try:
            self.study.optimize(objective, n_trials=1, catch=(TrialFailed,))
        except ValueError:
            if not (own and self.study.trials[own[-1].number].state.is_finished()):
                raise
            self.tell({"event": "note", "text": "a trial gave no sign of life for too long and was given to others; going on with the next"})

    def _objective(self, trial: optuna.Trial) -> tuple[float, float]:
        point: Point = tuple(trial.suggest_int(name, 0, n - 1) for name, n in zip(names(self.space, self.depth), self.space.choices(self.depth), strict=True))
        before = [t for t in self.study.get_trials(deepcopy=False) if t.number < trial.number and t.state in (TrialState.RUNNING, TrialState.COMPLETE)]
        if point in self.sampler.tried(before):
            raise optuna.TrialPruned  # another worker asked at the same time, and was first
        try:
            found = self._measured(point)
        except TrialFailed as failure:
            self.failed.append(str(failure))
            self.tell({"event": "note", "text": f"failed: {self.space.text(point)}: {failure}"})
            if len(self.failed) == FAILURES:
                raise TunesmithError(f"the last {FAILURES} trials failed, the last one with: {failure}") from None
            raise
        except BaseException as stop:
            if not isinstance(stop, Exception):
                self.study.enqueue_trial(trial.params)  # for whoever goes on
                if not isinstance(stop, KeyboardInterrupt):  # that one Optuna knows
                    self.study.tell(trial, state=TrialState.FAIL)
            raise
        self.failed.clear()
        for key, value in found.items():
            trial.set_user_attr(key, value)
        done = self._complete() + 1
        tell = {"event": "trial", "done": done, "total": self.trials, "text": found["text"], "metric": self.metric}
        self.tell(tell | {"value": found["value"], "cost": found[self.cost]})
        return found["value"], math.log10(max(found[self.cost], 1e-9))

    def _measured(self, point: Point) -> dict[str, Any]:
        """What training one configuration gives, in a folder of its own where a killed run goes on."""
        method = self.space.method(point)
        name = hashlib.sha256(json.dumps([self.tried, self.contents, method], sort_keys=True).encode()).hexdigest()[:16]
        folder = self.output / "trials" / name
        if not (folder / "summary.json").exists():
            failure = train_in_child(self.tried | {"method": method, "output": str(folder)})
            if failure:
                raise TrialFailed(failure)
        summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
        return {
            "value": summary["best"], "trainable": summary["params"]["trainable"], "percent": summary["params"]["percent"], "train_s": summary["train_s"],
            "peak_mb": summary["peak_mb"], "method": method, "text": self.space.text(point), "folder": f"trials/{name}",
        }  # fmt: skip
