"""Settings of all tests."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from budget import Budget

if not torch.cuda.is_available():
    # Read by Triton when a kernel is defined: without a GPU its interpreter runs our kernels.
    os.environ["TRITON_INTERPRET"] = "1"


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(Budget(), "budget")


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> Iterator[None]:
    """The tests' matrices are so small that threads would only wait for one another."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def unit_tests_stay_small(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A test marked `unit` needs neither transformers nor another process, such as the native kernels' compiler."""
    if not request.node.get_closest_marker("unit"):
        yield
        return

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a test marked unit starts no process")

    monkeypatch.setattr(subprocess, "Popen", refuse)
    monkeypatch.setattr(os, "fork", refuse)
    if "transformers" not in sys.modules:
        monkeypatch.setitem(sys.modules, "transformers", None)
    from lamella.ops.backend import portable_only

    with portable_only():
        yield
