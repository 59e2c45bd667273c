"""Build of the CPU kernels: one C++ library, compiled on first use for this machine's CPU, and cached."""

from __future__ import annotations

import hashlib
import os
import platform
import re
import shlex
import stat
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

try:
    import fcntl
except ImportError:  # no file locks on this system: two processes may compile the same library, which is harmless
    fcntl = None  # type: ignore[assignment]

FOLDER = Path(__file__).parent
_UNIT = FOLDER / "kernels.cpp"  # includes all other sources


def sources() -> list[Path]:
    """Return all source files of the library."""
    return sorted(path for path in FOLDER.iterdir() if path.suffix in (".cpp", ".h"))


def build() -> Path:
    """Return the compiled library, from the cache if it is there and intact.

    The environment variable `CXX` names the compiler, `LAMELLA_NATIVE_MARCH` replaces the instruction set "native", and
    `LAMELLA_NATIVE_TIMEOUT` is the most seconds that a compiler may take (600).

    A library is code that this process runs. So its folder and its file must belong to this user (or to root), other
    users must not be able to write to them, and the library's bytes must have the checksum that is stored beside it.
    Otherwise it is built again. A folder of another user is refused.

    Raises:
        OSError: there is no such compiler, or the cache cannot be written or trusted.
        subprocess.SubprocessError: the compiler fails or takes too long; `stderr` has its output.
        ValueError: an environment variable is malformed.
    """
    compiler = shlex.split(os.environ.get("CXX", "")) or ["g++"]
    march = os.environ.get("LAMELLA_NATIVE_MARCH", "native")
    limit = float(os.environ.get("LAMELLA_NATIVE_TIMEOUT") or 600)
    flags = ["-std=c++17", "-O3", f"-march={march}", "-fno-math-errno", "-fopenmp", "-fPIC"]
    version = _run([*compiler, "--version"], min(limit, 20))
    cache = _cache()
    library = cache / f"native-{_key([*compiler, *flags, version, _cpu()])}" / "kernels.so"
    for folder in (cache, library.parent):
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not _make_private(folder):
            _discard(library)  # another user may have put it there
    if _is_intact(library):
        return library
    # Of several processes that start at once, one compiles and the others wait for it.
    with _locked(library.parent / "lock", limit):
        if _is_intact(library):
            return library
        with tempfile.TemporaryDirectory(dir=library.parent) as scratch:
            compiled, linked = Path(scratch, "kernels.o"), Path(scratch, "kernels.so")
            _run([*compiler, *flags, "-c", str(_UNIT), "-o", str(compiled)], limit)
            # Linked without -fopenmp: the OpenMP runtime has to be the one torch brought, see bindings.load.
            _run([*compiler, "-shared", str(compiled), "-o", str(linked)], limit)
            checksum = Path(scratch, "kernels.sha256")
            checksum.write_text(hashlib.sha256(linked.read_bytes()).hexdigest())
            for file in (linked, checksum):
                file.chmod(0o700)
                _sync(file)
            os.replace(checksum, _checksum_of(library))
            os.replace(linked, library)
            _sync(library.parent)
    return library


def _discard(library: Path) -> None:
    """Remove a library and its checksum, if they are there."""
    for file in (library, _checksum_of(library)):
        with suppress(OSError):
            file.unlink()


def _checksum_of(library: Path) -> Path:
    return library.with_suffix(".sha256")


def _is_intact(library: Path) -> bool:
    """Return whether the library is there, private, and has its checksum.

    Raises:
        OSError: something other than a file is in its place.
    """
    try:
        found = library.lstat()
    except FileNotFoundError:
        return False
    if not stat.S_ISREG(found.st_mode):
        raise OSError(f"{library} is not a file: remove it")
    if _writable_by_others(found):
        return False  # the folder is private, so the file can be replaced
    try:
        return hashlib.sha256(library.read_bytes()).hexdigest() == _checksum_of(library).read_text()
    except (OSError, ValueError):
        return False


def _make_private(folder: Path) -> bool:
    """Take other users' right to write into a folder of this user; return whether they had none.

    Raises:
        OSError: the folder is a link, or belongs to another user.
    """
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid not in (0, os.geteuid()):
        raise OSError(f"{folder} is a link or belongs to another user: remove it, or set XDG_CACHE_HOME")
    if not found.st_mode & 0o022:
        return True
    folder.chmod(stat.S_IMODE(found.st_mode) & ~0o022)
    return False


def _writable_by_others(found: os.stat_result) -> bool:
    return found.st_uid not in (0, os.geteuid()) or bool(found.st_mode & 0o022)


def _sync(path: Path) -> None:
    """Wait until the file or folder is on the disk, so that a crash leaves no empty library under its final name."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _cache() -> Path:
    """Return the cache folder; a relative XDG_CACHE_HOME is ignored, as its specification asks."""
    given = Path(os.environ.get("XDG_CACHE_HOME") or "")
    return (given if given.is_absolute() else Path.home() / ".cache") / "lamella"


def _key(parts: list[str]) -> str:
    """Return a hash of the names and contents of all sources, and of `parts`."""
    contents = [part for path in sources() for part in (path.name.encode(), path.read_bytes())]
    return hashlib.sha256(b"\0".join([*contents, *(part.encode() for part in parts)])).hexdigest()[:16]


def _run(command: list[str], limit: float) -> str:
    """Run a command for at most `limit` seconds and return its output."""
    done = subprocess.run(
        command, check=True, capture_output=True, text=True, errors="replace", stdin=subprocess.DEVNULL, timeout=limit
    )
    return done.stdout


def _cpu() -> str:
    """Return the CPU's model and features, on which -march=native depends."""
    try:
        info = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor()
    return "\n".join(re.findall(r"^(?:model name|flags|CPU part|Features)\s*:.*$", info.split("\n\n")[0], re.MULTILINE))


@contextmanager
def _locked(path: Path, limit: float) -> Iterator[None]:
    """Hold an exclusive lock on a file, released by the system when the process ends.

    Raises:
        OSError: another process has held it for longer than `limit` seconds and its compilations.
    """
    with path.open("w") as file:
        if fcntl is not None:
            end = time.monotonic() + 2 * limit + 10
            while True:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if time.monotonic() > end:
                        raise OSError(f"{path} is locked by another process: end it, or remove the file") from None
                    time.sleep(0.1)
        yield
