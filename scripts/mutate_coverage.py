"""A pytest plugin that records which test executes which line of lamella, for `mutate.py`."""

from __future__ import annotations

import json
import os
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import coverage
import pytest

from budget import cpu_seconds

ROOT = Path(__file__).resolve().parents[1]
_coverage = coverage.Coverage(data_file=None, source=[str(ROOT / "src" / "lamella")], config_file=False)
_seconds: dict[str, float] = {}


def pytest_configure(config: pytest.Config) -> None:
    if "PYTEST_XDIST_WORKER" in os.environ:
        _coverage.start()


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[Any]:
    _coverage.switch_context(item.nodeid)
    start = cpu_seconds()
    result = yield
    _seconds[item.nodeid] = cpu_seconds() - start
    return result


def pytest_sessionfinish(session: pytest.Session) -> None:
    worker = os.environ.get("PYTEST_XDIST_WORKER")
    if worker is None:
        return
    _coverage.stop()
    data = _coverage.get_data()
    lines: dict[str, dict[int, list[str]]] = defaultdict(dict)
    for path in data.measured_files():
        relative = str(Path(path).relative_to(ROOT / "src" / "lamella"))
        for line, contexts in data.contexts_by_lineno(path).items():
            tests = [context for context in contexts if context]
            if tests:
                lines[relative][line] = tests
    folder = Path(os.environ["LAMELLA_COVERAGE"])
    (folder / f"{worker}.json").write_text(json.dumps({"lines": lines, "seconds": _seconds}))
