"""Registration with vLLM, and cases in which the plugin registers nothing."""

from __future__ import annotations

import logging
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed")

from lamella import vllm_plugin
from lamella.models.registry import architectures, model_types
from lamella.vllm_plugin import compat
from vllm_plugin.plugin_helpers import ENVIRONMENT, canon

KNOWN = """
from vllm.model_executor.models import ModelRegistry
from vllm.plugins import load_general_plugins
load_general_plugins()
names = set(ModelRegistry.get_supported_archs())
print(*sorted(name for name in names if name.startswith("Lamella") or "Canon" in name))
"""


def output_of(code: str, *arguments: str, **environment: str) -> str:
    """Return the last line that a new process prints."""
    result = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env={**os.environ, **ENVIRONMENT, **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    return (result.stdout.splitlines() or [""])[-1]


def test_vllm_knows_the_architectures_by_the_entry_point() -> None:
    known = output_of(KNOWN, VLLM_PLUGINS="lamella").split()
    assert set(known) == {"LlamaCanonForCausalLM", *(f"Lamella{name}" for name in architectures())}


def test_vllm_does_not_know_the_architectures_without_the_plugin() -> None:
    assert output_of(KNOWN, VLLM_PLUGINS="") == ""


def test_registering_again_has_no_effect_and_logs_nothing(plugin_log: pytest.LogCaptureFixture) -> None:
    from vllm.config import CompilationConfig
    from vllm.model_executor.models import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP

    vllm_plugin.register()
    before = dict(ModelRegistry.models), list(CompilationConfig._attention_ops), dict(MODELS_CONFIG_MAP)
    with plugin_log.at_level(logging.INFO):
        vllm_plugin.register()
    assert (dict(ModelRegistry.models), list(CompilationConfig._attention_ops), dict(MODELS_CONFIG_MAP)) == before
    assert not plugin_log.records


@pytest.mark.parametrize("found", [("0.99.0", (0, 99)), ("0.25.1", (0, 25)), None], ids=str)
def test_an_unsupported_version_is_one_line(
    found: tuple[str, tuple[int, int]] | None, monkeypatch: pytest.MonkeyPatch, plugin_log: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(compat, "installed", lambda: found)
    monkeypatch.setattr("lamella.vllm_plugin.registration.register_all", lambda: pytest.fail("registered all the same"))
    vllm_plugin.register()
    (record,) = plugin_log.records
    version = "vLLM is not installed" if found is None else f"vLLM {found[0]} is installed"
    assert f"not registered with vLLM: {version}; 0.26 to 0.33 are supported" in record.getMessage()


def test_a_vllm_that_has_changed_is_one_line(
    monkeypatch: pytest.MonkeyPatch, plugin_log: pytest.LogCaptureFixture
) -> None:
    def broken(operation: str) -> None:
        raise AttributeError("type object 'CompilationConfig' has no attribute '_attention_ops'")

    monkeypatch.setattr(compat, "split_graphs_at", broken)
    vllm_plugin.register()
    (record,) = plugin_log.records
    assert "not registered" in record.getMessage() and "_attention_ops" in record.getMessage()


def test_the_installed_version_is_a_supported_one() -> None:
    compat.require_supported()


@pytest.mark.parametrize(
    "name", ["LlamaForCausalLM", "Qwen3ForCausalLM", "Llama4ForCausalLM", "Llama4ForConditionalGeneration"]
)
def test_vllms_own_classes_are_not_shadowed(name: str) -> None:
    vllm_plugin.register()
    module = compat.module_of(name)
    assert module is not None and module.startswith("vllm.")


def test_transformers_own_configs_are_not_shadowed() -> None:
    from transformers import AutoConfig

    vllm_plugin.register()
    for model_type in model_types():
        module = type(AutoConfig.for_model(model_type)).__module__
        assert module.startswith("transformers.") == (model_type in ("llama", "qwen3", "llama4", "llama4_text"))


def test_a_config_can_be_unpickled_in_a_process_without_the_plugin(tmp_path: Path) -> None:
    from transformers import AutoConfig

    vllm_plugin.register()
    config = AutoConfig.from_pretrained(canon(tmp_path / "model", canon_set="AC"))
    assert config.num_hidden_layers == 3 and config.head_dim == 32
    (tmp_path / "config.pickle").write_bytes(pickle.dumps(config))
    load = "import pickle, sys; config = pickle.load(open(sys.argv[1], 'rb')); print(type(config), config.canon_set)"
    said = output_of(load, str(tmp_path / "config.pickle"), VLLM_PLUGINS="")
    assert said == f"{type(config)} AC"
