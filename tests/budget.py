"""A budget of CPU time for every test, and the slowest tests at the end of a run.

A test that is not marked `slow` or `gpu` and needs more than its limit, child processes included, fails the run. On a
machine with a CUDA device nothing has a limit: every test there starts a context and compiles its kernels, and those
CPU seconds say nothing about the suite. The hooks are registered by `conftest.py`; with pytest-xdist the workers
measure and the controller reports.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch

LIMIT, VLLM_LIMIT, REAL_LIMIT = 15.0, 60.0, 60.0  # CPU seconds
SHOWN = 15
_PROPERTY = "cpu_seconds"


def cpu_seconds() -> float:
    """Return the CPU time of this process and of its children that have ended."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def limit_of(item: pytest.Item) -> float | None:
    """Return the most CPU seconds that a test may take; None for no limit."""
    if item.get_closest_marker("slow") or item.get_closest_marker("gpu") or torch.cuda.is_available():
        return None
    if item.get_closest_marker("real"):
        return REAL_LIMIT
    return VLLM_LIMIT if item.get_closest_marker("vllm") else LIMIT


class Budget:
    """The hooks that measure, collect and judge."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.over: dict[str, tuple[float, float]] = {}

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        item.stash[_START] = cpu_seconds()
        return (yield)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
        report: Any = yield
        if report.when == "teardown":
            report.user_properties.append((_PROPERTY, (cpu_seconds() - item.stash[_START], limit_of(item))))
        return report

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        for name, value in report.user_properties if report.when == "teardown" else ():
            if name == _PROPERTY:
                used, limit = value
                self.seconds[report.nodeid] = used
                if limit is not None and used > limit:
                    self.over[report.nodeid] = (used, limit)

    @pytest.hookimpl(tryfirst=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if self.over and not hasattr(session.config, "workerinput") and session.exitstatus == 0:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        slowest = sorted(self.seconds.items(), key=lambda pair: -pair[1])[:SHOWN]
        terminalreporter.section(f"slowest {len(slowest)} tests, CPU seconds with child processes")
        for nodeid, used in slowest:
            terminalreporter.line(f"{used:7.2f}  {nodeid}")
        terminalreporter.line(f"{sum(self.seconds.values()):7.1f}  all {len(self.seconds)} tests")
        for nodeid, (used, limit) in self.over.items():
            terminalreporter.line(
                f"over budget: {nodeid} used {used:.1f} CPU seconds of {limit:.0f}; make it smaller, or mark it slow",
                red=True,
            )


_START = pytest.StashKey[float]()
