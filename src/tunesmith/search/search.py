"""A study of configurations in a database that any number of workers share, and the front they find."""

import json
import math
import time
import warnings
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

import optuna
import sqlalchemy
import yaml

from .. import data, models
from ..bench.compare import digest, pareto
from ..data import tasks
from ..errors import TunesmithError, nearest
from ..files import atomic_write
from ..methods.select import layers
from ..train import recipe as recipes
from ..train.recipe import Recipe
from . import page
from .sampler import HypervolumeSampler
from .space import Point, Space
from .worker import Worker

HEARTBEAT, GRACE = 20, 60  # seconds between a worker's signs of life, and after which one without is taken for dead


def search(
    base: Recipe | dict,
    output: str | Path,
    space: Space | None = None,
    trials: int = 60,
    startup: int = 20,
    cost: str = "trainable",
    storage: str | None = None,
    fidelity: dict | None = None,
    warm_start: str | Path | None = None,
    random: bool = False,
    seed: int = 0,
    progress: Callable[[dict], None] | None = None,
) -> dict:
    """Search `space` for configurations that are good and cheap on what the recipe `base` says, and write the front to `output`.

    trials: finished ones of all workers together; a worker is whoever runs the same command, here or elsewhere. startup: random
    ones among them. cost: trainable, train_s or peak_mb; its logarithm is minimised. storage: a database URL; default: an SQLite
    file in `output`. fidelity: recipe keys that are otherwise in the trials, such as {"limit": 1000}; the front's recipes have
    the recipe's own. warm_start: `output` of an earlier search of the same space, whose front is tried first. random: random
    search, to compare with. progress: told of {"event": "trial", ...} and {"event": "note", "text"}.

    Trials of workers that were killed are taken up again, from their last checkpoint where the folder is at hand; the last worker
    waits for those of others. Writes search.json, search.html and front/*.yaml. It ends early where the space has no more points.
    Returns what search.json holds. Raises `TunesmithError` for bad input, a database that cannot be reached, a study of another
    recipe, data or space, and where trials fail one after another (`worker.FAILURES`), or all.
    """
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    space, output, tell = space or Space(), Path(output), progress or (lambda event: None)
    if cost not in page.TITLES:
        raise TunesmithError(f"there is no cost {cost!r}{nearest(cost, page.TITLES)}; there are {', '.join(page.TITLES)}")
    if isinstance(base, Recipe):
        base = base.model_dump(mode="json", exclude_unset=True)
    base = {key: value for key, value in base.items() if key not in ("method", "output")}
    tried = {key: value for key, value in (base | (fidelity or {})).items() if key != "test"}
    recipes.check(base), recipes.check(tried)
    metric, higher, depth = _facts(recipes.check(tried))
    sampler = HypervolumeSampler(space, depth, math.inf if random else startup, seed)
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise TunesmithError(f"the output {output} cannot be made: {error.strerror}; name another folder with --output") from None
    where = _without_password(storage) if storage else output
    study = _study(storage or f"sqlite:///{output.resolve() / 'study.db'}", sampler, higher)
    contents = digest(tried)
    about = json.dumps({"recipe": tried, "data": contents, "space": space.model_dump(), "cost": cost, "depth": depth}, sort_keys=True)
    if study.user_attrs.get("about") not in (None, about):
        raise TunesmithError(f"the study in {where} is of another recipe, space or cost, or of data that have changed; choose another output or database")
    study.set_user_attr("about", about)
    if warm_start and not study.trials:
        for point in _front_of(warm_start, space, depth):
            study.enqueue_trial(sampler.params(point))

    worker = Worker(study, sampler, space, tried, contents, output, metric, cost, depth, trials, tell)
    with _telling_of_the_database(where):
        worker.run()
    return _report(study, sampler, space, base, {key: value for key, value in tried.items() if base.get(key) != value}, output, cost, metric, higher)


@contextmanager
def _telling_of_the_database(where: str | Path):
    """Turns whatever Optuna raises when it loses the database into one sentence."""
    try:
        yield
    except TunesmithError:
        raise
    except Exception as error:
        cause = error
        while cause and not isinstance(cause, sqlalchemy.exc.SQLAlchemyError | optuna.exceptions.StorageInternalError):
            cause = cause.__cause__ or cause.__context__
        if not cause:
            raise
        raise TunesmithError(f"lost the database {where}: {str(cause).splitlines()[0]}; run the command again to go on") from error


def _facts(recipe: Recipe) -> tuple[str, bool, int]:
    """(metric, whether more of it is better, transformer layers of the model)."""
    if not recipe.eval and not recipe.holdout:
        raise TunesmithError("a search chooses by data that are held out from training: give eval, or a holdout above 0")
    rows = data.load(recipe.data, recipe.split, recipe.limit)
    task = tasks.get(recipe.task or tasks.guess(rows))
    labels = task.labels(rows, task.columns(rows, recipe.columns))
    model, _ = models.load(recipe.model, task.name, labels)
    return task.metric, task.higher_is_better, max(depth for _, _, depth in layers(model).values())


def _study(url: str, sampler: HypervolumeSampler, higher: bool) -> optuna.Study:
    options = {"connect_args": {"timeout": 60}} if url.startswith("sqlite") else {"pool_pre_ping": True}
    for attempt in range(10):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)  # heartbeats
                again = optuna.storages.RetryHeartbeatStaleTrialCallback()
                storage = optuna.storages.RDBStorage(url, engine_kwargs=options, heartbeat_interval=HEARTBEAT, grace_period=GRACE, heartbeat_stale_trial_callback=again)
            return optuna.create_study(study_name="tunesmith", storage=storage, directions=["maximize" if higher else "minimize", "minimize"], sampler=sampler, load_if_exists=True)
        except (sqlalchemy.exc.SQLAlchemyError, optuna.exceptions.StorageInternalError, ImportError, ValueError) as error:
            if attempt < 9 and any(word in str(error).lower() for word in ("unique", "already exists", "duplicate")):
                time.sleep(0.2 * (attempt + 1))  # another worker is making the tables
                continue
            raise TunesmithError(f"cannot use the database {_without_password(url)}: {str(error).splitlines()[0]}") from error


def _without_password(url: str) -> str:
    try:
        return sqlalchemy.make_url(url).render_as_string(hide_password=True)
    except (sqlalchemy.exc.ArgumentError, ValueError):
        return "that was given, which is not a database URL,"


def _front_of(folder: str | Path, space: Space, depth: int) -> list[Point]:
    try:
        found = json.loads((Path(folder) / "search.json").read_text(encoding="utf-8"))
        points, searched = [tuple(row["point"]) for row in found["trials"] if row["front"]], found["space"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise TunesmithError(f"{folder} holds no finished search to start from: search.json is missing or damaged") from error
    if json.dumps(searched) != json.dumps(space.model_dump()) or any(len(point) != len(space.choices(depth)) for point in points):
        raise TunesmithError(f"the search in {folder} is of another space, or of a model of another depth")
    return points


def _report(study: optuna.Study, sampler: HypervolumeSampler, space: Space, base: dict, fidelity: dict, output: Path, cost: str, metric: str, higher: bool) -> dict:
    finished = [t for t in study.get_trials(deepcopy=False) if t.state == optuna.trial.TrialState.COMPLETE]
    front = pareto([(t.user_attrs[cost], t.user_attrs["value"] if higher else -t.user_attrs["value"]) for t in finished])
    rows = [{"number": t.number, "point": list(sampler.point(t.params)), "front": i in front, **t.user_attrs} for i, t in enumerate(finished)]
    failed = sum(t.state == optuna.trial.TrialState.FAIL for t in study.trials)
    result = {"recipe": base, "fidelity": fidelity, "space": space.model_dump(), "metric": metric, "higher_is_better": higher, "cost": cost, "failed": failed, "trials": rows}
    for place, i in enumerate(front):
        row = rows[i]
        at = "".join(f", {key}={value}" for key, value in fidelity.items())
        text = f"# {row['text']}: {metric} {row['value']:.4f}{at and f' (in a trial with {at[2:]})'}, {row['trainable']:,} trained parameters\n"
        atomic_write(output / "front" / f"{place:02d}.yaml", text + yaml.safe_dump(base | {"method": row["method"]}, sort_keys=False, allow_unicode=True))
    for old in (output / "front").glob("*.yaml"):
        if old.stem.isdecimal() and int(old.stem) >= len(front):
            old.unlink(missing_ok=True)  # workers may finish together
    atomic_write(output / "search.json", json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    atomic_write(output / "search.html", page.html(result))
    return result
