"""Settings of vLLM that these tests share: engines in this process, a small cache, no waiting for compilers."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest

from vllm_plugin.plugin_helpers import ENVIRONMENT, numba_hidden


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.parent == Path(__file__).parent:
            item.add_marker(pytest.mark.vllm)


@pytest.fixture(autouse=True, scope="session")
def vllm_settings() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in ENVIRONMENT.items():
            patch.setenv(name, value)
        yield


@pytest.fixture(autouse=True)
def engines_may_start_after_numba() -> Iterator[None]:
    with numba_hidden():
        yield


@pytest.fixture
def plugin_log(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> pytest.LogCaptureFixture:
    """What the plugin says, which goes to vLLM's logger otherwise, and from there to nobody else."""
    from lamella import vllm_plugin
    from lamella.vllm_plugin import checks
    from lamella.vllm_plugin.loading import weights

    for module in (vllm_plugin, checks, weights):
        monkeypatch.setattr(module, "logger", logging.getLogger("lamella"))
    caplog.set_level(logging.WARNING, "lamella")
    return caplog
