"""Data sets from files, from named folders and from the Hugging Face hub, as an in-memory `datasets.Dataset`."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from ..errors import TunesmithError, nearest
from ..models.hub import quiet, unreachable
from .files import READERS
from .rows import sample

SPLIT_NAMES = {"val": ("val", "validation", "valid", "dev"), "train": ("train", "training"), "test": ("test",)}


def load(source: str | Path, split: str = "train", limit: int | None = None):
    """Return a `datasets.Dataset` held in memory; nothing is written beside the user's files.

    `source`: a .csv, .tsv, .json, .jsonl, .parquet or .txt file; a folder or a name with such files, `<name>_<split>.csv`
    or `<split>.csv`, the name being looked for in `$TUNESMITH_DATA`, in `../shared/data` and among the package's samples
    (`contact-centre`, `contact-centre-answers`); else a hub name, with its configuration after a colon
    (`nyu-mll/glue:sst2`). `split` chooses among the splits that the source has; a file without splits is read whole.
    Class indices become class names. `limit` keeps that many rows, evenly spread.

    Raises `TunesmithError` when there is no such source or split, and for a file that cannot be read as it stands.
    """
    path = Path(source)
    if path.is_file():
        rows = _file(path, split)
    elif path.is_dir():
        rows = _file(_in_folder(path, split), split)
    elif path.suffix in READERS:
        there = path.parent.iterdir() if path.parent.is_dir() else ()
        raise TunesmithError(f"there is no file {source}{nearest(path.name, [f.name for f in there])}")
    elif found := _named(str(source), split):
        rows = _file(found, split)
    else:
        rows = _hub(str(source), split)
    if not len(rows):
        raise TunesmithError(f"{source} has no data rows" + (f': only the header {", ".join(rows.column_names)}'
                                                             if rows.column_names else ""))
    return sample(rows, limit)


def _file(path: Path, split: str):
    if path.suffix not in READERS:
        raise TunesmithError(f'{path}: files of type "{path.suffix}" are not read; it can be {", ".join(READERS)}')
    try:
        content = path.read_bytes()
    except OSError as error:
        raise TunesmithError(f"cannot read {path}: {error.strerror}") from error
    if not content.strip():
        raise TunesmithError(f"{path} is empty")
    return _plain(READERS[path.suffix](content, str(path), lambda there: pick_split(there, split, str(path))))


def pick_split(there, wanted: str, source: str) -> str:
    """The name among `there` that `wanted` means ("val", "validation" and "dev" are one)."""
    there = list(there)
    same = next((names for names in SPLIT_NAMES.values() if wanted in names), (wanted,))
    for name in (wanted, *same):
        if name in there:
            return name
    raise TunesmithError(f'{source} has no split "{wanted}"{nearest(wanted, there)}; its splits are {", ".join(there)}')


def _plain(dataset):
    """Class indices replaced by their names, -1 (no label) by None."""
    from datasets import ClassLabel

    for column, feature in dataset.features.items():
        if isinstance(feature, ClassLabel):
            names = [feature.names[i] if i is not None and i >= 0 else None for i in dataset[column]]
            dataset = dataset.remove_columns(column).add_column(column, names)
    return dataset


def _roots() -> list[Path]:
    shared = Path("..", "shared", "data")
    repository = Path(__file__).resolve().parents[3]
    roots = [Path(os.environ["TUNESMITH_DATA"])] if os.environ.get("TUNESMITH_DATA") else []
    samples = Path(__file__).resolve().parents[1] / "samples"
    return [r for r in (*roots, shared, repository / shared, samples) if r.is_dir()]


def _files_of(root: Path, name: str) -> dict[str, Path]:
    """split -> file, for the files under `root` called name_split.*, or "" -> the one file that is called name.*."""
    found = {}
    for path in sorted(root.rglob("*")):
        if path.stem.startswith(name) and path.suffix in READERS and path.is_file():
            rest = path.stem[len(name):]
            if rest in ("", "_small"):
                found.setdefault("", path)
            elif rest.startswith("_") and any(rest[1:] in names for names in SPLIT_NAMES.values()):
                found.setdefault(rest[1:], path)
    return found


def _named(name: str, split: str) -> Path | None:
    for root in _roots():
        found = _files_of(root, name) if Path(name).name == name else {}
        if "" in found:
            return found[""]
        if found:
            return found[pick_split(found, split, name)]
    return None


def _in_folder(folder: Path, split: str) -> Path:
    found = {path.stem: path for path in sorted(folder.iterdir()) if path.suffix in READERS}
    if not found:
        raise TunesmithError(f"the folder {folder} holds no data file ({', '.join(READERS)})")
    return found[pick_split(found, split, str(folder))]


def _known_names() -> list[str]:
    stems = [path.stem for root in _roots() for path in root.rglob("*") if path.suffix in READERS]
    ends = tuple(f"_{name}" for names in SPLIT_NAMES.values() for name in names) + ("_small",)
    return sorted({next((s[:-len(e)] for e in ends if s.endswith(e)), s) for s in stems})


@contextlib.contextmanager
def _no_bars() -> Iterator[None]:
    from datasets.utils import disable_progress_bars, enable_progress_bars
    from datasets.utils.tqdm import are_progress_bars_disabled

    if are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()


def _hub(source: str, split: str):
    from datasets import DownloadConfig, load_dataset
    from huggingface_hub import HfApi

    name, _, config = source.partition(":")
    try:
        with quiet(), _no_bars():
            offline = unreachable(lambda: HfApi().dataset_info(name, timeout=10))
            splits = load_dataset(name, config or None, download_config=DownloadConfig(local_files_only=offline))
            return _plain(splits[pick_split(splits, split, source)])
    except TunesmithError:
        raise
    except Exception as error:  # noqa: BLE001 - the hub library raises whatever its HTTP client and builders raise
        known = _known_names()
        reason = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
        raise TunesmithError(f'there is no data "{source}"{nearest(source, known)}: it is not a file'
                             + (f', not one of {", ".join(known)},' if known else "")
                             + f" and the hub gave none ({reason})") from error
