"""The workers of a search on a Ray cluster."""

import os
from collections.abc import Callable
from pathlib import Path

from ..errors import TunesmithError
from ..train.recipe import Recipe
from .search import search


def on_ray(base: Recipe | dict, output: str | Path, workers: int | None = None, storage: str | None = None, progress: Callable[[dict], None] | None = None, **options) -> dict:
    """`search` with its `options` by workers on a Ray cluster: the one that $RAY_ADDRESS names, else one on this machine.

    workers: default one for each GPU, or for each CPU where there is none; each has its share of both. Ray starts a worker that dies
    again, and its trial is taken up again. On several machines the workers need a database in common, and the same data and
    models at the same paths. Returns what `search` returns.
    Raises `TunesmithError` where ray is not installed or not reached, and for several machines without a database.
    """
    try:
        import ray
        from ray.exceptions import RayError, RayTaskError
        from ray.util.queue import Empty, Queue
    except ImportError as error:
        raise TunesmithError("a search on ray needs the package: pip install 'tunesmith[ray]'") from error
    here = not ray.is_initialized()
    try:
        if here:
            try:
                ray.init(log_to_driver=False, logging_level="error", include_dashboard=False)
            except ValueError as error:
                raise TunesmithError(f"$RAY_ADDRESS={os.environ.get('RAY_ADDRESS', '')!r} names no ray cluster: {str(error).splitlines()[0]}") from None
        if storage is None and sum(node["Alive"] for node in ray.nodes()) > 1:
            raise TunesmithError("workers on several machines need one database: give --storage, such as postgresql+psycopg://user@host/name")
        have = ray.cluster_resources()
        workers = workers or max(1, int(have.get("GPU", 0) or have.get("CPU", 1)))
        cpus, gpus = (int(share) or share for share in (have.get(kind, 0) / workers for kind in ("CPU", "GPU")))  # ray takes no 1.5
        events = Queue()
        work = ray.remote(num_cpus=cpus, num_gpus=gpus, max_retries=-1)(_work)
        seed, output = options.pop("seed", 0), Path(output).resolve()
        same = {"output": output, "storage": storage, **options}
        running = [work.remote(os.getcwd(), events, {"base": base, "seed": seed + i, **same}) for i in range(workers)]
        while running:
            done, running = ray.wait(running, timeout=0.2)
            ray.get(done)
            try:
                while progress:
                    progress(events.get(block=False))
            except Empty:
                pass
    except RayTaskError as error:
        raise (error.cause if isinstance(error.cause, TunesmithError) else error) from None
    except (RayError, ConnectionError) as error:
        raise TunesmithError(f"the ray cluster cannot be used: {str(error).splitlines()[0]}") from error
    finally:
        if here:
            ray.shutdown()
    return search(base, seed=seed, **same)


def _work(folder: str, events, arguments: dict) -> None:
    os.chdir(folder)
    search(**arguments, progress=events.put)
