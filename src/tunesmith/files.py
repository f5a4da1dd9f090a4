"""Files that are either wholly there or not there at all."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .errors import TunesmithError


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def atomic_write(path: str | Path, content: bytes | str) -> None:
    """Replace `path` by `content` (text is UTF-8): a reader sees the old file or the new, never half.

    Raises `TunesmithError` when the disk refuses (full, read-only, missing rights); `path` is then untouched.
    """
    path = Path(path)
    data = content.encode() if isinstance(content, str) else content
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
            temporary = Path(file.name)
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.chmod(0o644)
        temporary.replace(path)
    except OSError as error:
        if temporary:
            temporary.unlink(missing_ok=True)
        raise TunesmithError(f"cannot write {path}: {error.strerror}") from error


@contextmanager
def atomic_folder(path: str | Path) -> Iterator[Path]:
    """Yield an empty folder that takes the place of `path` when the block ends without an error.

    Raises `TunesmithError` when the disk refuses; what stood at `path` before is then still there.
    """
    path = Path(path)
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
        temporary.chmod(0o755)
        yield temporary
        for file in temporary.rglob("*"):
            if file.is_file():
                _sync(file)
        old = None
        if path.exists():
            old = temporary.with_name(temporary.name + ".old")
            path.rename(old)
        try:
            temporary.rename(path)
        except OSError:
            if old:
                old.rename(path)
            raise
        _sync(path.parent)
        if old:
            shutil.rmtree(old)
    except OSError as error:
        raise TunesmithError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        if temporary and temporary.exists():
            shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def only_writer(folder: str | Path) -> Iterator[None]:
    """Keep other processes, also those of machines that share the disk, from such a block for `folder`; one that is killed keeps nobody.

    Raises `TunesmithError` at once where another is in it.
    """
    from filelock import FileLock, Timeout

    folder = Path(folder).resolve()
    lock = FileLock(folder.with_name(f".{folder.name}.lock"))
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except Timeout:
        raise TunesmithError(f"another process is writing {folder}; wait until it has ended, or choose another folder") from None
    except OSError as error:
        raise TunesmithError(f"cannot write {folder.parent}: {error.strerror or error}") from error
    try:
        yield
    finally:
        Path(lock.lock_file).unlink(missing_ok=True)
        lock.release()
