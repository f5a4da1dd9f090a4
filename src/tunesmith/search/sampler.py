"""The next configuration to try: Gaussian processes of both objectives, and where the front is expected to grow most."""

import itertools
import math
import random
import warnings
from collections.abc import Callable, Iterable

import numpy as np
import optuna
import torch
from optuna.samplers import BaseSampler
from optuna.trial import FrozenTrial, TrialState

from .space import Point, Space

STARTS, SAMPLES = 10, 64
SMALL = 4096  # points that are listed rather than drawn


def names(space: Space, depth: int) -> list[str]:
    """The parameters of a trial, in the order of a point's coordinates."""
    return [*space.parts, *(f"layer{i}" for i in range(depth if space.layers == "any" else 0))]


def clipped(values: np.ndarray) -> np.ndarray:
    """`values` (n, 2) brought to within three times the distance of their column's quartiles from these, where that is not 0."""
    first, third = np.quantile(values, [0.25, 0.75], axis=0)
    most = np.where(third > first, 3 * (third - first), np.inf)
    return np.clip(values, first - most, third + most)


class HypervolumeSampler(BaseSampler):
    """Random valid points first, then the maximiser of log noisy expected hypervolume improvement (Daulton et al. 2021, Ament et al. 2023).

    Both objectives are modelled by Gaussian processes over the unit cube of coordinates; values far from the others, as of a trial
    that diverged, are clipped. (The authors take normal quantiles of ranks, and a reference point at the front's worst values; on
    a made-up objective of the default space either finds a smaller front.) A point that was tried, or that another worker is
    trying, is not proposed again. `startup`: random trials before the first guided one; infinite for random search.
    """

    def __init__(self, space: Space, depth: int, startup: float, seed: int = 0):
        self.space, self.choices, self.names = space, space.choices(depth), names(space, depth)
        self.startup, self.seed = startup, seed

    def infer_relative_search_space(self, study, trial):
        return {name: optuna.distributions.IntDistribution(0, count - 1) for name, count in zip(self.names, self.choices, strict=True)}

    def sample_relative(self, study: optuna.Study, trial: FrozenTrial, search_space):
        known = [t for t in study.get_trials(deepcopy=False) if t.number != trial.number and self.whole(t)]
        finished = [t for t in known if t.state == TrialState.COMPLETE]
        running = [t for t in known if t.state == TrialState.RUNNING]
        draw = random.Random(f"{self.seed}/{trial.number}")
        tried = self.tried(known)  # also what failed: what a dead worker left is taken up by itself
        if len(finished) < max(self.startup, 4):
            return self.params(self.drawn(draw, tried))
        values = np.array([t.values for t in finished]) * [1 if d.name == "MAXIMIZE" else -1 for d in study.directions]
        return self.params(self.guided([self.point(t.params) for t in finished], values, [self.point(t.params) for t in running], draw, tried))

    def sample_independent(self, study, trial, param_name, param_distribution):
        return random.Random(f"{self.seed}/{trial.number}/{param_name}").randint(param_distribution.low, param_distribution.high)

    def whole(self, trial: FrozenTrial) -> bool:
        """Whether a trial got as far as having a point."""
        return set(self.names) <= trial.params.keys()

    def tried(self, trials: Iterable[FrozenTrial]) -> set[Point]:
        return {self.point(t.params) for t in trials if self.whole(t)}

    def point(self, params: dict) -> Point:
        return tuple(params[name] for name in self.names)

    def params(self, point: Point) -> dict[str, int]:
        return dict(zip(self.names, point, strict=True))

    def drawn(self, draw: random.Random, tried: set[Point]) -> Point:
        """A valid point; one that was not tried, unless all were, or seem to have been in a large space."""
        if math.prod(self.choices) <= SMALL:
            points = [point for point in itertools.product(*map(range, self.choices)) if self.space.valid(point)]
            return draw.choice([point for point in points if point not in tried] or points)
        for _ in range(1000):
            point = tuple(draw.randrange(count) for count in self.choices)
            if self.space.valid(point) and point not in tried:
                return point
        return next(p for p in iter(lambda: tuple(draw.randrange(count) for count in self.choices), None) if self.space.valid(p))

    def unit(self, points: list[Point]) -> torch.Tensor:
        return torch.tensor(points, dtype=torch.float64) / (torch.tensor(self.choices, dtype=torch.float64) - 1)

    def guided(self, points: list[Point], values: np.ndarray, running: list[Point], draw: random.Random, tried: set[Point]) -> Point:
        """The best point found by one-exchange search from the front and from random points; `values` (n, 2) are to be maximised."""
        from botorch.acquisition.multi_objective import logei
        from botorch.fit import fit_gpytorch_mll
        from botorch.models import ModelListGP, SingleTaskGP
        from botorch.models.transforms import Standardize
        from botorch.sampling import SobolQMCNormalSampler
        from gpytorch.mlls import SumMarginalLogLikelihood

        X, Y = self.unit(points), torch.tensor(clipped(values), dtype=torch.float64)
        with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
            warnings.simplefilter("ignore")
            torch.manual_seed(draw.randrange(2**31))
            model = ModelListGP(*(SingleTaskGP(X, Y[:, i : i + 1], outcome_transform=Standardize(1)) for i in range(Y.shape[1])))
            fit_gpytorch_mll(SumMarginalLogLikelihood(model.likelihood, model))
            low, high = Y.amin(0), Y.amax(0)
            logei._load_attempted = True  # else it compiles a kernel, behind a lock file that a killed worker leaves for ever
            acquisition = logei.qLogNoisyExpectedHypervolumeImprovement(
                model, ref_point=(low - 0.1 * (high - low)).tolist(), X_baseline=X, prune_baseline=True, X_pending=self.unit(running) if running else None,
                sampler=SobolQMCNormalSampler(torch.Size([SAMPLES]), seed=draw.randrange(2**31)),
            )  # fmt: skip
            front = [points[i] for i in range(len(points)) if not ((Y >= Y[i]).all(1) & (Y > Y[i]).any(1)).any()]
            starts = {*front, *(self.drawn(draw, tried) for _ in range(STARTS))}
            return self.climb(lambda candidates: self.score(acquisition, candidates), starts, draw, tried)

    def score(self, acquisition, candidates: list[Point]) -> list[float]:
        with torch.no_grad():
            return acquisition(self.unit(candidates)[:, None]).tolist()

    def climb(self, score: Callable[[list[Point]], list[float]], starts: set[Point], draw: random.Random, tried: set[Point]) -> Point:
        best, best_score = None, -np.inf
        for start in sorted(starts):
            here, value = start, -np.inf
            while True:
                near = [here[:i] + (v,) + here[i + 1 :] for i, count in enumerate(self.choices) for v in range(count) if v != here[i]]
                near = [point for point in near if self.space.valid(point) and point not in tried]
                if not near:
                    break
                scores = score(near)
                top = max(scores)
                if top <= value:
                    break
                here, value = near[scores.index(top)], top
            if value > best_score:
                best, best_score = here, value
        return best if best is not None and best not in tried else self.drawn(draw, tried)
