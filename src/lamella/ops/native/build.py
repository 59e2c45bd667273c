"""Build of the CPU kernels: one C++ library, compiled on first use for this machine's CPU, and cached."""

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
except ImportError:  # no file locks on this system: two processes may compile the same library, which is harmless
    fcntl = None  # type: ignore[assignment]

FOLDER = Path(__file__).parent
_UNIT = FOLDER / "kernels.cpp"  # includes all other sources


def sources() -> list[Path]:
    """Return all source files of the library."""
    return sorted(path for path in FOLDER.iterdir() if path.suffix in (".cpp", ".h"))


def build() -> Path:
    """Return the compiled library; compile it if it is not cached.

    The environment variable `CXX` names the compiler, and `LAMELLA_NATIVE_MARCH` replaces the instruction set "native".

    Raises:
        OSError: the compiler does not exist, or the cache cannot be written.
        subprocess.CalledProcessError: the compiler fails; `stderr` has its output.
    """
    compiler = shlex.split(os.environ.get("CXX", "")) or ["g++"]
    march = os.environ.get("LAMELLA_NATIVE_MARCH", "native")
    flags = ["-std=c++17", "-O3", f"-march={march}", "-fno-math-errno", "-fopenmp", "-fPIC"]
    version = _run(*compiler, "--version")
    library = _cache() / f"native-{_key([*compiler, *flags, version, _cpu()])}" / "kernels.so"
    if library.exists():
        return library
    library.parent.mkdir(parents=True, exist_ok=True)
    # If several processes start at once, one compiles and the others wait for it.
    with _locked(library.parent / "lock"):
        if library.exists():
            return library
        with tempfile.TemporaryDirectory(dir=library.parent) as scratch:
            compiled, linked = f"{scratch}/kernels.o", f"{scratch}/kernels.so"
            _run(*compiler, *flags, "-c", str(_UNIT), "-o", compiled)
            # Linked without -fopenmp: the OpenMP runtime must be torch's, see bindings.load.
            _run(*compiler, "-shared", compiled, "-o", linked)
            os.replace(linked, library)
    return library


def _cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lamella"


def _key(parts: list[str]) -> str:
    """Return a hash of the names and contents of all sources, and of `parts`."""
    contents = [part for path in sources() for part in (path.name.encode(), path.read_bytes())]
    return hashlib.sha256(b"\0".join([*contents, *(part.encode() for part in parts)])).hexdigest()[:16]


def _run(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def _cpu() -> str:
    """Return the CPU's model and features, on which -march=native depends."""
    try:
        info = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor()
    return "\n".join(re.findall(r"^(?:model name|flags|CPU part|Features)\s*:.*$", info.split("\n\n")[0], re.MULTILINE))


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold an exclusive lock on a file; the system releases it if the process ends."""
    with path.open("w") as file:
        if fcntl is not None:
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
