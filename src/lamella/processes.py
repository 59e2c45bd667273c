"""Commands that run a module of this package in a process of its own."""

from __future__ import annotations

import sys

# `python -m` and `python -c` put the current folder first on the search path, where anybody's file could stand for a
# module. Python 3.11 has an option against it and 3.10 has none, so the entry goes before anything is imported.
_RUN = (
    "import sys; sys.path[:] = [entry for entry in sys.path if entry]; "
    "from runpy import run_module; run_module({!r}, alter_sys=True, run_name='__main__')"
)


def module_command(module: str, *arguments: str) -> list[str]:
    """Return the command that runs `module` with `arguments`, without the current folder on its search path."""
    return [sys.executable, "-c", _RUN.format(module), *arguments]
