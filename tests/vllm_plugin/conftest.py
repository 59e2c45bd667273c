"""Settings of vLLM that these tests share: engines in this process, a small cache, no waiting for compilers."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from vllm_plugin.plugin_helpers import ENVIRONMENT


@pytest.fixture(autouse=True, scope="session")
def vllm_settings() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in ENVIRONMENT.items():
            patch.setenv(name, value)
        yield
