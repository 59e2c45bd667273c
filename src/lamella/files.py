"""Files and terminals: writing that is complete or does not happen, and text that cannot control a terminal."""

from __future__ import annotations

import glob
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from lamella.errors import CheckpointError, UserError

try:
    import fcntl
except ImportError:  # not on this system
    fcntl = None  # type: ignore[assignment]


@contextmanager
def writing(target: str | Path, error: type[UserError] = CheckpointError, *others: type[Exception]) -> Iterator[None]:
    """Turn the operating system's errors inside the block into one line that names `target`.

    Args:
        target: what is written.
        error: type to raise.
        others: exceptions of libraries that stand for errors of writing.
    """
    try:
        yield
    except Exception as caught:
        if not isinstance(caught, (OSError, *others)):
            raise
        reason = getattr(caught, "strerror", None) or str(caught).partition("\n")[0]
        way_out = "make room or get access there, or name another place"
        raise error(f"{target}: cannot be written ({reason}); {way_out}") from caught


def write_text(file: Path, text: str, error: type[UserError] = CheckpointError) -> None:
    """Replace a file, whole or not at all.

    The text goes into a new file of an unpredictable name in the same folder, which then takes the place of `file`. So
    nothing is written through a link, neither one in place of `file` nor a planted one.

    Raises:
        UserError: of the type `error`, if the file cannot be written; then it is as it was.
    """
    with writing(file, error):
        if str(file.absolute()).startswith(("/dev/", "/proc/")) or (file.exists() and not file.is_file()):
            file.write_text(text, encoding="utf-8")  # a device or a pipe cannot be replaced
            return
        descriptor, name = tempfile.mkstemp(dir=file.parent, prefix=f".{file.name}-")
        try:
            with os.fdopen(descriptor, "w", encoding="utf-8") as stream:
                stream.write(text)
                stream.flush()
                os.fsync(stream.fileno())
            os.chmod(name, _mode(file))
            os.replace(name, file)
        except BaseException:
            with suppress(OSError):
                os.unlink(name)
            raise


def write_json(file: Path, values: Mapping[str, Any]) -> None:
    """Replace a JSON file, whole or not at all; see `write_text`."""
    write_text(file, json.dumps(values, indent=2, ensure_ascii=False) + "\n")


def _mode(file: Path) -> int:
    """Return the permissions of a file that is replaced, or those that a new file would get."""
    with suppress(OSError):
        if file.is_file() and not file.is_symlink():
            return file.stat().st_mode & 0o777
    mask = os.umask(0)
    os.umask(mask)
    return 0o666 & ~mask


@contextmanager
def new_folder(destination: Path) -> Iterator[Path]:
    """Give a folder to fill, which takes the name `destination` when the block ends without an error.

    Until then it has a hidden name beside it. If the process is killed, it stays there; the next call for the same
    destination removes it, by a lock that the system releases with the process.

    Raises:
        CheckpointError: the folder cannot be made, or `destination` has come to exist.
    """
    with writing(destination):
        destination.parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(destination)
        scratch = Path(tempfile.mkdtemp(dir=destination.parent, prefix=_prefix(destination)))
    try:
        with (scratch / _LOCK).open("w") as lock:
            with writing(destination):
                _lock(lock)
                folder = scratch / destination.name
                folder.mkdir()
            yield folder
            if destination.exists():
                raise CheckpointError(f"{destination}: is there already; nothing is overwritten")
            with writing(destination):
                folder.rename(destination)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def copy_file(source: Path, destination: Path, folder: Path) -> None:
    """Copy a file of a model's folder, and nothing else that may have its name.

    A link is followed if it leads to a file of the same folder, or to a blob of the Hub cache that the folder is a
    snapshot of. Folders are left out.

    Raises:
        CheckpointError: a link leads elsewhere or nowhere, or something other than a file is there; or it cannot be
            written.
    """
    if source.is_dir():
        return
    if source.is_symlink():
        real, root = Path(os.path.realpath(source)), Path(os.path.realpath(folder))
        # .../models--OWNER--NAME/snapshots/COMMIT links to .../models--OWNER--NAME/blobs
        blobs = root.parent.parent / "blobs" if root.parent.name == "snapshots" else root
        if not real.is_relative_to(root) and not real.is_relative_to(blobs):
            raise CheckpointError(f"{source}: a link to {real}, outside of the folder: put the file itself there")
    if not source.is_file():
        raise CheckpointError(f"{source}: not a file, or a link that leads nowhere: remove it, or put the file there")
    with writing(destination):
        shutil.copyfile(source, destination)


_LOCK = ".lock"


def _prefix(destination: Path) -> str:
    return f".{destination.name}.partial-"


def _lock(file: IO[str]) -> None:
    """Lock a file for as long as it is open. Raises `OSError` if another process has it."""
    if fcntl is not None:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _remove_abandoned(destination: Path) -> None:
    """Remove what processes that were killed have left of earlier calls."""
    for scratch in destination.parent.glob(f"{glob.escape(_prefix(destination))}*"):
        with suppress(OSError), (scratch / _LOCK).open("r+") as lock:
            _lock(lock)
            shutil.rmtree(scratch, ignore_errors=True)
