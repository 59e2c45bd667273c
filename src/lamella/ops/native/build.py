"""Building the CPU kernels: one C++ library, compiled on first use for the machine that it runs on, and cached."""

from __future__ import annotations

import hashlib
import os
import platform
import re
import shlex
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

try:
    import fcntl
except ImportError:  # not on this system: two processes may compile the same, and either result serves
    fcntl = None  # type: ignore[assignment]

FOLDER = Path(__file__).parent
_UNIT = FOLDER / "kernels.cpp"  # includes all other sources


def sources() -> list[Path]:
    """Return every file that the library is made of."""
    return sorted(path for path in FOLDER.iterdir() if path.suffix in (".cpp", ".h"))


def build() -> Path:
    """Return the compiled library, from the cache if it is there.

    The environment variable `CXX` names the compiler, and `LAMELLA_NATIVE_MARCH` replaces the instruction set "native".

    Raises:
        OSError: there is no such compiler, or the cache cannot be written.
        subprocess.CalledProcessError: the compiler fails; `stderr` says why.
    """
    compiler = shlex.split(os.environ.get("CXX", "")) or ["g++"]
    march = os.environ.get("LAMELLA_NATIVE_MARCH", "native")
    flags = ["-std=c++17", "-O3", f"-march={march}", "-fno-math-errno", "-fopenmp", "-fPIC"]
    version = _run(*compiler, "--version")
    library = _cache() / f"native-{_key([*compiler, *flags, version, _cpu()])}" / "kernels.so"
    if library.exists():
        return library
    library.parent.mkdir(parents=True, exist_ok=True)
    # Of several processes that start at once, one compiles and the others wait for it.
    with _locked(library.parent / "lock"):
        if library.exists():
            return library
        with tempfile.TemporaryDirectory(dir=library.parent) as scratch:
            compiled, linked = f"{scratch}/kernels.o", f"{scratch}/kernels.so"
            _run(*compiler, *flags, "-c", str(_UNIT), "-o", compiled)
            # Linked without -fopenmp: the OpenMP runtime has to be the one torch brought, see bindings.load.
            _run(*compiler, "-shared", compiled, "-o", linked)
            os.replace(linked, library)
    return library


def _cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lamella"


def _key(parts: list[str]) -> str:
    """Return a hash of all sources, by name, and of what else the library depends on."""
    contents = [part for path in sources() for part in (path.name.encode(), path.read_bytes())]
    return hashlib.sha256(b"\0".join([*contents, *(part.encode() for part in parts)])).hexdigest()[:16]


def _run(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def _cpu() -> str:
    """Return what -march=native depends on: the CPU's model, and the features that this (virtual) machine shows."""
    try:
        info = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor()
    return "\n".join(re.findall(r"^(?:model name|flags|CPU part|Features)\s*:.*$", info.split("\n\n")[0], re.MULTILINE))


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold an exclusive lock on a file, released by the system when the process ends."""
    with path.open("w") as file:
        if fcntl is not None:
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
