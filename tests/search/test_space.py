"""The space of configurations, and the sampler over it."""

import itertools
import math
import random

import numpy as np
import optuna
import pytest

import tunesmith as ts
from tests import tiny
from tunesmith import TunesmithError
from tunesmith.search.sampler import HypervolumeSampler, names
from tunesmith.search.space import Space, load

SMALL = Space(parts={"lora": [0, 1, 4], "series-adapter": {"bottleneck": [0, 2, 8], "activation": "relu"}})


def test_points_are_methods():
    assert SMALL.choices(2) == [3, 3, 2, 2]
    assert SMALL.method((1, 0, 1, 0)) == {"method": "lora", "rank": 1, "layers": [0]}
    both = SMALL.method((2, 1, 1, 1))
    assert both == {"method": "combined", "parts": [{"method": "lora", "rank": 4}, {"method": "series-adapter", "bottleneck": 2, "activation": "relu"}]}
    assert SMALL.text((2, 1, 0, 1)) == "lora 4 + series-adapter 2 in 1"
    assert not SMALL.valid((0, 0, 1, 1)) and not SMALL.valid((1, 1, 0, 0)) and SMALL.valid((1, 0, 0, 1))
    model = ts.adapt(tiny.BUILDERS["llama"](), SMALL.method((2, 1, 0, 1)))
    assert {site.path.split(".")[2] for site in ts.summary(model).sites} == {"1"}


def test_the_papers_space_has_as_many_points():
    sizes = [0, 1, 3, 6, 12, 24, 48, 96, 192, 384, 768]
    space = Space(parts={"lora": sizes, "series-adapter": sizes, "prefix-tuning": sizes})
    assert math.prod(space.choices(12)) == 5_451_776
    assert space.size(12) == 5_446_350


def test_all_layers():
    space = Space(parts={"lora": [0, 8]}, layers="all")
    assert space.choices(12) == [2] and space.method((1,)) == {"method": "lora", "rank": 8} and not space.valid((0,))


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("parts: {lorra: [0, 1]}", "unknown method 'lorra'"),
        ("parts: {lora: [4, 1]}", "different whole numbers, ascending"),
        ("parts: {lora: [0]}", "two or more"),
        ("parts: {bitfit: [0, 1]}", "bitfit has no size"),
        ("parts: {lora: {alpha: 16}}", "needs one field with a list"),
        ("part: {lora: [0, 1]}", "part"),
        ("parts: {}", "has no part"),
    ],
)
def test_a_wrong_space_is_named(tmp_path, text, match):
    (tmp_path / "space.yaml").write_text(text)
    with pytest.raises(TunesmithError, match=match):
        load(tmp_path / "space.yaml")


def made_up(space, point, draw):
    """Better with more, in later layers above all, and less so the more there is."""
    sizes = [values[i] for i, (_, _, values, _) in zip(point, space.sizes, strict=False)]
    bits = point[len(space.parts) :]
    amount = sum(sizes) * sum(bits)
    gain = sum(b * (i + 1) for i, b in enumerate(bits)) / sum(range(1, len(bits) + 1)) * (1 - math.exp(-sum(s / (6 * (k + 1)) for k, s in enumerate(sizes))))
    return gain + draw.gauss(0, 0.003), math.log10(amount)


def hypervolume(study, reference=(0.0, 3.5)):
    front = sorted((t.values[1], t.values[0]) for t in study.best_trials)
    area, best = 0.0, reference[0]
    for i, (cost, gain) in enumerate(front):
        right = front[i + 1][0] if i + 1 < len(front) else reference[1]
        best = max(best, gain)
        area += max(0, right - cost) * (best - reference[0])
    return area


def searched(startup, seed, n=26):
    space = Space(parts={"lora": [0, 1, 4, 16], "series-adapter": [0, 1, 4, 16]})
    sampler, draw = HypervolumeSampler(space, 4, startup, seed), random.Random(seed)
    study = optuna.create_study(directions=["maximize", "minimize"], sampler=sampler)
    for _ in range(n):
        trial = study.ask()
        point = tuple(trial.suggest_int(name, 0, count - 1) for name, count in zip(names(space, 4), space.choices(4), strict=True))
        assert space.valid(point)
        study.tell(trial, made_up(space, point, draw))
    return study


def test_guided_trials_find_more_than_random_ones():
    guided, at_random = searched(8, 0), searched(math.inf, 0)
    assert len({tuple(t.params.values()) for t in guided.trials}) == len(guided.trials)
    assert hypervolume(guided) > hypervolume(at_random)


def test_proposals_are_the_same_twice():
    one, two = (searched(4, 1, 9) for _ in range(2))
    assert [t.params for t in one.trials] == [t.params for t in two.trials]


def test_what_another_worker_tries_is_not_proposed():
    space = Space(parts={"lora": [0, 1, 4]}, layers="all")
    sampler = HypervolumeSampler(space, 2, 1, 0)
    study = optuna.create_study(directions=["maximize", "minimize"], sampler=sampler)
    points = {tuple(study.ask(dict(sampler.infer_relative_search_space(study, None))).params.values()) for _ in range(2)}
    assert points == {(1,), (2,)}
    assert np.isfinite(hypervolume(searched(math.inf, 3, 5)))


@pytest.mark.parametrize("layers", ["any", "all"])
@pytest.mark.parametrize("parts", [{"lora": [0, 1, 4]}, {"lora": [1, 4], "prefix-tuning": [0, 2]}, {"lora": [0, 1], "prefix-tuning": [0, 2, 3], "prompt-tuning": [0, 5]}, {"prefix-tuning": [1, 2]}, {"prompt-tuning": [1, 2], "lora": [0, 3]}])
def test_the_size_of_a_space(parts, layers):
    space = Space(parts=parts, layers=layers)
    points = [point for point in itertools.product(*map(range, space.choices(3))) if space.valid(point)]
    assert space.size(3) == len(points) == len({str(space.method(point)) for point in points})


def test_a_field_may_be_a_list_of_names():
    assert Space(parts={"lora": {"rank": [0, 4], "targets": ["q_proj", "v_proj"]}}).sizes == [("lora", "rank", [0, 4], {"targets": ["q_proj", "v_proj"]})]
