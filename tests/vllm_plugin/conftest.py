"""Settings of vLLM shared by these tests: engines in this process, a small cache, no compilation."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from vllm_plugin.plugin_helpers import ENVIRONMENT, built, canon, configured, numba_hidden


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
    """Capture the plugin's log, which otherwise goes to vLLM's logger without propagating."""
    from lamella import vllm_plugin
    from lamella.vllm_plugin import checks
    from lamella.vllm_plugin.loading import weights

    for module in (vllm_plugin, checks, weights):
        monkeypatch.setattr(module, "logger", logging.getLogger("lamella"))
    caplog.set_level(logging.WARNING, "lamella")
    return caplog


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a random LlamaCanon with all options on."""
    return canon(tmp_path_factory.mktemp("canon"))


@pytest.fixture(scope="class")
def unfilled(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """The model of `folder` inside vLLM, before its weights are loaded."""
    with built(configured(folder), tmp_path_factory.mktemp("group")) as model:
        yield model
