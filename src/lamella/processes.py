"""Commands that run a module of this package in its own process."""

from __future__ import annotations

import sys

# `python -m` and `python -c` put the current folder first on the search path, where a file could replace a module.
# Python 3.10 has no option to disable this, so the entry is removed before anything is imported.
_RUN = (
    "import sys; sys.path[:] = [entry for entry in sys.path if entry]; "
    "from runpy import run_module; run_module({!r}, alter_sys=True, run_name='__main__')"
)


def module_command(module: str, *arguments: str) -> list[str]:
    """Return the command that runs `module` with `arguments`, without the current folder on the search path."""
    return [sys.executable, "-c", _RUN.format(module), *arguments]
