"""Searches end to end: the front and its recipes, several workers, one that is killed, PostgreSQL."""

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest

from tunesmith import TunesmithError
from tunesmith.cli import Interrupted
from tunesmith.search import search as module
from tunesmith.search import worker
from tunesmith.search.cluster import on_ray
from tunesmith.search.search import search
from tunesmith.search.space import Space
from tunesmith.train import recipe as recipes

SPACE = Space(parts={"lora": [0, 1, 4], "bone": [0, 2, 4]})


@pytest.fixture
def base(models, data):
    return {"model": models["bert"], "data": data["tickets"], "epochs": 1, "limit": 40, "batch_size": 8, "log_every": 50}


def fake(values):
    """Stands for training: writes the summary of a run."""

    def train(recipe):
        method = recipe["method"]
        parts = method["parts"] if method["method"] == "combined" else [method]
        trained = sum(part["rank"] for part in parts) * len(parts[0].get("layers", [0, 1]))
        if trained in values.get("fail", ()):
            return "out of memory"
        folder = module.Path(recipe["output"])
        folder.mkdir(parents=True)
        summary = {"best": 1 - 1 / (1 + trained), "params": {"trainable": trained, "percent": 0.1}, "train_s": 1.0, "peak_mb": 10.0 + trained}
        (folder / "summary.json").write_text(json.dumps(summary))
        values.setdefault("runs", []).append(recipe)
        return None

    return train


def test_a_front_and_its_recipes(tmp_path, base, monkeypatch):
    monkeypatch.setattr(worker, "train_in_child", fake(values := {}))
    told = []
    found = search(base | {"test": base["data"]}, tmp_path / "s", SPACE, trials=12, startup=6, fidelity={"limit": 10}, progress=told.append)
    assert len(found["trials"]) == len(told) == len(values["runs"]) == 12
    assert all(run["limit"] == 10 and "test" not in run for run in values["runs"])
    assert len({row["folder"] for row in found["trials"]}) == 12
    front = sorted((row for row in found["trials"] if row["front"]), key=lambda row: row["trainable"])
    assert front and all(a["value"] <= b["value"] for a, b in zip(front, front[1:], strict=False))
    files = sorted((tmp_path / "s" / "front").glob("*.yaml"))
    assert len(files) == len(front)
    assert found["fidelity"] == {"limit": 10} and "(in a trial with limit=10)" in files[0].read_text()
    recipe = recipes.load(files[0])
    assert recipe.limit == 40 and recipe.test and recipe.method == front[0]["method"]
    assert "<svg" in (page := (tmp_path / "s" / "search.html").read_text()) and "limit=10." in page
    (mine := tmp_path / "s" / "front" / "mine.yaml").write_text("method: lora\n")
    again = search(base | {"test": base["data"]}, tmp_path / "s", SPACE, trials=12, startup=6, fidelity={"limit": 10})
    assert again["trials"] == found["trials"] and len(values["runs"]) == 12 and mine.exists()
    with pytest.raises(TunesmithError, match="of another recipe, space or cost"):
        search(base, tmp_path / "s", SPACE, trials=12)
    search(base, tmp_path / "other", SPACE, trials=len(front), warm_start=tmp_path / "s")
    warm = json.loads((tmp_path / "other" / "search.json").read_text())
    assert {row["text"] for row in warm["trials"]} == {row["text"] for row in front}
    with pytest.raises(TunesmithError, match="is of another space"):
        search(base, tmp_path / "third", Space(parts=dict(reversed(SPACE.parts.items()))), trials=2, warm_start=tmp_path / "s")


def test_what_cannot_be_trained_is_left_out(tmp_path, base, monkeypatch):
    monkeypatch.setattr(worker, "train_in_child", fake({"fail": {2, 8}}))
    found = search(base, tmp_path / "s", SPACE, trials=8, startup=4)
    assert len(found["trials"]) == 8 and all(row["trainable"] not in (2, 8) for row in found["trials"])


def test_bad_input_is_named(tmp_path, base):
    with pytest.raises(TunesmithError, match="no cost 'time'"):
        search(base, tmp_path / "s", SPACE, cost="time")
    with pytest.raises(TunesmithError, match="no finished search to start from"):
        search(base, tmp_path / "s", SPACE, warm_start=tmp_path / "nothing")
    (tmp_path / "nothing").mkdir()
    (tmp_path / "nothing" / "search.json").write_text("{}")
    with pytest.raises(TunesmithError, match="no finished search to start from"):
        search(base, tmp_path / "s", SPACE, warm_start=tmp_path / "nothing")
    (tmp_path / "file").write_text("")
    with pytest.raises(TunesmithError, match="the output .*file cannot be made: File exists"):
        search(base, tmp_path / "file", SPACE)
    with pytest.raises(TunesmithError, match="cannot use the database that was given, which is not a database URL"):
        search(base, tmp_path / "t", SPACE, storage="postgresql+psycopg://me:secret@localhost:abc/x")
    with pytest.raises(TunesmithError, match=r"cannot use the database postgresql\+psycopg://me:\*\*\*@localhost:1/x"):
        search(base, tmp_path / "t", SPACE, storage="postgresql+psycopg://me:secret@localhost:1/x?connect_timeout=2")


def command(base, output, *more):
    keys = [f"{key}={value}" for key, value in base.items() if key not in ("data", "model")]
    return [sys.executable, "-m", "tunesmith", "search", "--data", base["data"], "--model", base["model"], "--output", str(output), "--json", *more, *keys]


def test_a_killed_worker_loses_nothing(tmp_path, base):
    """Its trial is taken up by the next worker, once it has given no sign of life for a while."""
    (tmp_path / "space.yaml").write_text("parts: {lora: [0, 1, 2, 4]}\nlayers: all\n")
    script = "import tunesmith.search.search as s; s.HEARTBEAT, s.GRACE = 1, 2; from tunesmith.cli import main; main()"
    argv = command(base | {"epochs": 3}, tmp_path / "s", "--space", str(tmp_path / "space.yaml"), "--trials", "3", "--startup", "3")
    argv[1:3] = ["-c", script]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    worker = subprocess.Popen(argv, stdout=subprocess.DEVNULL, env=environment, start_new_session=True)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not list((tmp_path / "s" / "trials").glob("*/recipe.yaml")):
        time.sleep(0.02)
    os.killpg(worker.pid, signal.SIGKILL)
    worker.wait()
    assert list((tmp_path / "s" / "trials").glob("*/recipe.yaml")) and not (tmp_path / "s" / "search.json").exists()
    done = subprocess.run(argv, capture_output=True, text=True, env=environment, timeout=240)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert sorted(row["method"]["rank"] for row in found["trials"]) == [1, 2, 4] and found["failed"] == 1


POSTGRES = shutil.which("initdb") or next(iter(sorted(module.Path("/usr/lib/postgresql").glob("*/bin/initdb"))), None)


@pytest.fixture(scope="module")
def database():
    """The URL of a server of its own."""
    if not POSTGRES:
        pytest.skip("PostgreSQL is not installed")
    programs = module.Path(POSTGRES).resolve().parent
    folder = module.Path(f"/tmp/tunesmith-pg-{os.getpid()}")
    as_user = []
    folder.mkdir()
    if os.getuid() == 0:  # the server does not run as root
        shutil.chown(folder, "nobody")
        as_user = ["setpriv", "--reuid=nobody", "--clear-groups"]
    run = lambda *argv: subprocess.run([*as_user, *argv], check=True, capture_output=True, cwd="/tmp", timeout=60)  # noqa: E731
    try:
        run(str(programs / "initdb"), "-D", str(folder / "data"), "-U", "tuner", "-A", "trust")
        options = f"-c listen_addresses= -c unix_socket_directories={folder} -c fsync=off"
        run(str(programs / "pg_ctl"), "-D", str(folder / "data"), "-o", options, "-l", str(folder / "log"), "-w", "start")
        yield f"postgresql+psycopg://tuner@/postgres?host={folder}"
    finally:
        subprocess.run([*as_user, str(programs / "pg_ctl"), "-D", str(folder / "data"), "-m", "immediate", "stop"], capture_output=True, cwd="/tmp")
        shutil.rmtree(folder, ignore_errors=True)


def test_two_workers_share_a_postgres_database(tmp_path, base, database):
    (tmp_path / "space.yaml").write_text("parts: {lora: [0, 1, 2, 3, 4, 5, 6]}\nlayers: all\n")
    more = ("--space", str(tmp_path / "space.yaml"), "--trials", "4", "--startup", "4", "--storage", database)
    workers = [
        subprocess.Popen(command(base, tmp_path / name, *more), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
        for name in ("one", "two")
    ]
    outputs = [worker.communicate(timeout=240) for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0], outputs
    found = json.loads((tmp_path / "one" / "search.json").read_text())["trials"] + json.loads((tmp_path / "two" / "search.json").read_text())["trials"]
    texts = {row["number"]: row["text"] for row in found}
    assert len(set(texts.values())) == len(texts) in (4, 5)  # 5 where both looked for the last one at the same time
    folders = [len(list((tmp_path / name / "trials").iterdir())) for name in ("one", "two")]
    assert min(folders) >= 1 and sum(folders) == len(texts)


@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="ray is not installed")
def test_workers_on_ray(tmp_path, base):
    events = []
    found = on_ray(base, tmp_path / "s", 2, progress=events.append, space=SPACE, trials=4, startup=2)
    assert len(found["trials"]) >= 4 and sum(event["event"] == "trial" for event in events) == len(found["trials"])
    assert len({row["folder"] for row in found["trials"]}) == len(found["trials"]) and (tmp_path / "s" / "search.html").exists()
    with pytest.raises(TunesmithError, match="of another recipe, space or cost"):
        on_ray(base | {"epochs": 2}, tmp_path / "s", 1, space=SPACE, trials=8)


def test_a_search_that_gets_nowhere_ends(tmp_path, base, monkeypatch, capfd):
    monkeypatch.setattr(worker, "train_in_child", lambda recipe: "out of memory")
    told = []
    for tries in (5, 10):  # another worker, or the same one again
        with pytest.raises(TunesmithError, match="the last 5 trials failed, the last one with: out of memory"):
            search(base, tmp_path / "s", SPACE, trials=8, progress=told.append)
        assert len(told) == tries and all("out of memory" in event["text"] for event in told)
    with pytest.raises(TunesmithError, match="no configuration of the space could be trained; the last one failed with: out of memory"):
        search(base, tmp_path / "small", Space(parts={"lora": [1, 2]}, layers="all"))
    assert "Traceback" not in capfd.readouterr().err
    with pytest.raises(TunesmithError, match="held out from training: give eval, or a holdout"):
        search(base | {"holdout": 0}, tmp_path / "t", SPACE)


def test_a_search_ends_where_its_space_does(tmp_path, base, monkeypatch):
    monkeypatch.setattr(worker, "train_in_child", fake(values := {}))
    space = Space(parts={"lora": [0, 1, 2, 4]}, layers="all")
    found = search(base, tmp_path / "s", space, trials=9)
    assert len(found["trials"]) == len(values["runs"]) == 3
    assert search(base, tmp_path / "s", space, trials=9)["trials"] == found["trials"] and len(values["runs"]) == 3


@pytest.mark.parametrize("kind", [KeyboardInterrupt, Interrupted])
def test_an_interrupted_trial_is_taken_up_again(tmp_path, base, monkeypatch, kind):
    def interrupt(recipe):
        raise kind

    space = Space(parts={"lora": [0, 1, 2, 4]}, layers="all")
    monkeypatch.setattr(worker, "train_in_child", interrupt)
    with pytest.raises(kind):
        search(base, tmp_path / "s", space, trials=3)
    monkeypatch.setattr(worker.time, "sleep", None)  # there is nobody to wait for
    monkeypatch.setattr(worker, "train_in_child", fake({}))
    assert sorted(row["trainable"] for row in search(base, tmp_path / "s", space, trials=3)["trials"]) == [2, 4, 8]


def test_a_point_that_another_worker_has_is_not_trained_again(tmp_path, base, monkeypatch):
    """Workers that ask at the same time are proposed the same point."""
    proposed = iter([1, 1, 2, 1, 3])
    monkeypatch.setattr(module.HypervolumeSampler, "sample_relative", lambda self, study, trial, _: {"lora": next(proposed)})
    monkeypatch.setattr(worker, "train_in_child", fake(values := {}))
    found = search(base, tmp_path / "s", Space(parts={"lora": [0, 1, 2, 4]}, layers="all"), trials=3)
    assert [row["method"]["rank"] for row in found["trials"]] == [run["method"]["rank"] for run in values["runs"]] == [1, 2, 4]


def test_a_trial_that_was_given_to_others_does_not_end_the_search(tmp_path, base, monkeypatch):
    """As after a sleep of the machine that was longer than the grace."""
    import optuna

    train, studies = fake({}), []
    monkeypatch.setattr(module, "_study", lambda *args, make=module._study: studies.append(make(*args)) or studies[-1])

    def late(recipe):
        if len(studies[0].trials) == 1:
            studies[0].tell(0, state=optuna.trial.TrialState.FAIL)
        return train(recipe)

    monkeypatch.setattr(worker, "train_in_child", late)
    told = []
    found = search(base, tmp_path / "s", SPACE, trials=2, progress=told.append)
    assert [row["number"] for row in found["trials"]] == [1, 2] and any("no sign of life" in event.get("text", "") for event in told)


def test_a_lost_database_is_named(tmp_path, base, monkeypatch):
    def gone(recipe):
        (tmp_path / "s" / "study.db").write_bytes(b"not a database" * 1000)
        return fake({})(recipe)

    monkeypatch.setattr(worker, "train_in_child", gone)
    with pytest.raises(TunesmithError, match="lost the database .*: .*; run the command again to go on"):
        search(base, tmp_path / "s", SPACE, trials=2)


def test_changed_data_are_another_search(tmp_path, base, monkeypatch):
    monkeypatch.setattr(worker, "train_in_child", fake({}))
    mine = tmp_path / "mine.csv"
    text = module.Path(base["data"]).read_text()
    mine.write_text(text)
    search(base | {"data": str(mine)}, tmp_path / "s", SPACE, trials=2)
    mine.write_text(text + text.splitlines()[1] + "\n")
    with pytest.raises(TunesmithError, match="or of data that have changed"):
        search(base | {"data": str(mine)}, tmp_path / "s", SPACE, trials=2)
