"""Llama 4's experts by vLLM's layer: expert parallelism and quantised experts, from every layout of files.

Layers that need a GPU are built here too, and their loaded weights are compared with the file.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Llama4TextConfig

pytest.importorskip("vllm", reason="vLLM is not installed")

from vllm.model_executor.models.utils import PPMissingLayer

from helpers import hf_checkpoint
from lamella.errors import CheckpointError, ConfigError
from lamella.vllm_plugin import compat
from lamella.vllm_plugin.checks import Checks
from vllm_plugin.plugin_helpers import (
    MAX_LEN,
    ON_CPU,
    assert_right,
    built,
    configured,
    generate,
    needs_exact_int8,
    oracle,
    prompts_of,
    refused,
)
from vllm_plugin.test_plugin_llama4 import (
    CASES,
    LENGTHS,
    OURS,
    SHAPE,
    assert_right_on_two,
    needs_two,
    one_by_one,
    original,
    reading_images,
    serving,
    write,
)

EXPERTS = SHAPE["num_local_experts"]
FP8 = torch.float8_e4m3fn
LARGEST = torch.finfo(FP8).max


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    found = {}
    for name in ("scout", "top 2, tied"):
        found[name] = tmp_path_factory.mktemp("llama4")
        hf_checkpoint(found[name], Llama4TextConfig(**SHAPE | {"intermediate_size": 64} | CASES[name]))
    return found


def method_names(model: Any) -> dict[str, str]:
    """Return the quantization method of each module, by its path."""
    methods = {path: getattr(module, "quant_method", None) for path, module in model.named_modules()}
    return {path: type(method).__name__ for path, method in methods.items() if method is not None}


class TestWholeExperts:
    """One rank holds all experts; two ranks hold half of them each."""

    @pytest.mark.parametrize("name", ["scout", "top 2, tied"])
    @pytest.mark.parametrize("eager", [True, False], ids=["eager", "compiled"])
    def test_tokens(self, folders: dict[str, Path], name: str, eager: bool) -> None:
        options = {"enable_expert_parallel": True, "max_num_batched_tokens": 64, "enforce_eager": eager}
        with serving(folders[name], **options) as llm:
            (kinds,) = llm.apply_model(lambda model: {type(module).__name__ for module in model.modules()})
            assert_right(oracle(folders[name]), generate(llm, prompts_of(*LENGTHS), 24))
        assert "VllmExperts" in kinds and "Experts" not in kinds

    def test_one_by_one(self, folders: dict[str, Path], tmp_path: Path) -> None:
        tensors, values = original(folders["scout"])
        with serving(write(tmp_path, one_by_one(tensors), values), enable_expert_parallel=True) as llm:
            assert_right(oracle(folders["scout"]), generate(llm, prompts_of(*LENGTHS), 12))

    @needs_two
    def test_two_ranks(self, folders: dict[str, Path]) -> None:
        assert_right_on_two(folders["scout"], {"tensor_parallel_size": 2, "enable_expert_parallel": True})

    def test_rows_of_other_ranks_experts_are_zero(self, folders: dict[str, Path], tmp_path: Path) -> None:
        """vLLM's CPU kernels expect expert ids that are local to the rank."""
        tensors, _ = original(folders["scout"])
        with built(configured(folders["scout"], hf_overrides=OURS, enable_expert_parallel=True), tmp_path) as model:
            model.load_weights(tensors.items())
            experts = model.model.layers[0].feed_forward.experts
            rows: list[tuple[Tensor, Tensor]] = []
            experts.layer.forward = lambda x, ids: rows.append((x, ids)) or x
            experts.local_ids = torch.tensor([-1, -1, 0, 1])
            experts(torch.ones(4, SHAPE["hidden_size"]), 10 * torch.eye(4))
        ((x, ids),) = rows
        assert ids.tolist() == [[0], [0], [0], [1]]
        assert x[:2].eq(0).all() and x[2:].sub(torch.tensor(10.0).sigmoid()).abs().max() < 1e-6


def in_ranges(tensors: Mapping[str, Tensor], choose: Callable[[str], bool], largest: float, dtype: torch.dtype) -> Any:
    """Quantise the tensors chosen by `choose`, with a scale per row; return stored and dequantised tensors."""
    stored, meant = dict(tensors), dict(tensors)
    for name, tensor in tensors.items():
        if choose(name):
            scale = tensor.abs().amax(1, keepdim=True) / largest
            stored[name] = (tensor / scale).round().to(dtype) if dtype == torch.int8 else (tensor / scale).to(dtype)
            stored[f"{name}_scale"] = scale
            meant[name] = stored[name].float() * scale
    return stored, meant


def is_feed_forward(name: str) -> bool:
    return name.endswith("_proj.weight") and "self_attn" not in name


def compressed(kind: str, name: str, *whole: str) -> dict[str, Any]:
    grid = {"num_bits": 8, "type": kind, "symmetric": True}
    scheme = {
        "targets": ["Linear"],
        "weights": grid | {"strategy": "channel", "dynamic": False},
        "input_activations": grid | {"strategy": "token", "dynamic": True},
    }
    return {
        "quant_method": "compressed-tensors",
        "format": name,
        "config_groups": {"group_0": scheme},
        # As files have it: by pattern, and by the name in a model that reads images as well.
        "ignore": ["re:.*lm_head", "re:.*layers.[0-2].self_attn", "re:.*router", *LAST_ATTENTION, *whole],
    }


LAST_ATTENTION = [f"language_model.model.layers.3.self_attn.{part}_proj" for part in "qkvo"]


class TestInt8:
    """In bfloat16, as these products require. vLLM requires AMX for experts on CPUs, although its kernel does not."""

    @pytest.fixture
    def amx(self, monkeypatch: pytest.MonkeyPatch) -> None:
        if not (ON_CPU and torch.cpu._is_vnni_supported()):
            pytest.skip("needs VNNI")
        if not compat.is_at_least(0, 32):
            pytest.skip("a kernel that routes by itself, and not as we do; or no such quantisation")
        cpu_moe = pytest.importorskip("vllm.model_executor.layers.fused_moe.experts.cpu_moe")
        monkeypatch.setattr(cpu_moe.CPUExpertsInt8, "_supports_current_device", staticmethod(lambda: True))

    @needs_exact_int8
    def test_experts_left_whole(self, folders: dict[str, Path], tmp_path: Path) -> None:
        tensors, values = original(folders["scout"])
        stored, meant = in_ranges(tensors, is_feed_forward, 127, torch.int8)
        form = {"quantization_config": compressed("int", "int-quantized", "re:.*feed_forward.experts")}
        self.run(tmp_path, (meant, values), (stored, values | form), "UnquantizedFusedMoEMethod")

    @pytest.mark.usefixtures("amx")
    def test_experts(self, folders: dict[str, Path], tmp_path: Path) -> None:
        tensors, values = original(folders["scout"])
        stored, meant = in_ranges(one_by_one(tensors), is_feed_forward, 127, torch.int8)
        form = {"quantization_config": compressed("int", "int-quantized")}
        self.run(tmp_path, (meant, values), (stored, values | form), "CompressedTensorsW8A8Int8MoEMethod")

    @pytest.mark.usefixtures("amx")
    def test_experts_of_a_file_that_is_not_quantised(self, folders: dict[str, Path], tmp_path: Path) -> None:
        file = original(folders["scout"])
        self.run(tmp_path, file, file, "Int8OnlineMoEMethod", quantization="int8_per_channel_weight_only")

    def run(self, folder: Path, meant: Any, stored: Any, of_experts: str, **options: Any) -> None:
        for name, file in (("meant", meant), ("stored", stored)):
            (folder / name).mkdir()
            write(folder / name, *file)
        with serving(folder / "stored", dtype="bfloat16", **options) as llm:
            (methods,) = llm.apply_model(method_names)
            outputs = generate(llm, prompts_of(3, 20, 40), 1)
        assert {method for path, method in methods.items() if path.endswith("routed_experts")} == {of_experts}
        for output in outputs:
            ((token, said),) = output.outputs[0].logprobs[0].items()
            expected = oracle(folder / "meant")(output.prompt_token_ids)[-1].log_softmax(-1)
            assert said.logprob == pytest.approx(float(expected[token]), abs=0.2)


def assert_methods(methods: Mapping[str, str], of_experts: str) -> None:
    """Check that attention is not quantised and everything else is."""
    for path, method in methods.items():
        if path.endswith(("qkv_proj", "o_proj")):
            assert method == "UnquantizedLinearMethod", path
        if path.endswith(("gate_up_proj", "down_proj")):
            assert "Unquantized" not in method, path
        if path.endswith("routed_experts"):
            assert method == of_experts, path


def of_modelopt(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return a file in ModelOpt's FP8: one scale per tensor and one per input, experts of a layer in one tensor."""
    stored, meant = dict(tensors), dict(tensors)
    for index, (name, tensor) in enumerate(tensors.items()):
        in_one = "experts." in name and "shared" not in name
        if not in_one and not is_feed_forward(name):
            continue
        scale = tensor.abs().max() / LARGEST
        stored[name] = (tensor / scale).to(FP8)
        stem = f"{name}_" if in_one else f"{name.removesuffix('.weight')}."
        stored |= {f"{stem}weight_scale": scale, f"{stem}input_scale": torch.tensor(0.5 + index)}
        meant[name] = stored[name].float() * scale
    for layer in range(SHAPE["num_hidden_layers"]):
        attention = f"model.layers.{layer}.self_attn"
        stored |= {f"{attention}.k_proj.k_scale": torch.tensor(0.25), f"{attention}.v_proj.v_scale": torch.tensor(0.75)}
    return stored, meant


def of_compressed_tensors(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    stored, meant = in_ranges(one_by_one(tensors), is_feed_forward, LARGEST, FP8)
    return {f"language_model.{name}": tensor for name, tensor in stored.items()}, meant


MODELOPT = {
    "quant_method": "modelopt",
    "quant_algo": "FP8",
    "ignore": ["lm_head", "*self_attn*", "*router*"],
    "config_groups": {},
}
FORMS: dict[str, tuple[Callable[..., Any], dict[str, Any], str]] = {
    "compressed-tensors": (
        of_compressed_tensors,
        compressed("float", "float-quantized"),
        "CompressedTensorsW8A8Fp8MoEMethod",
    ),
    "modelopt": (of_modelopt, MODELOPT, "ModelOptFp8MoEMethod"),
}


@pytest.fixture(params=FORMS)
def quantised(
    request: pytest.FixtureRequest, folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Any:
    """Return an FP8 model inside vLLM, its file, and the dequantised tensors. Kernels are not selected."""
    from vllm.model_executor.layers.fused_moe.oracle.fp8 import Fp8MoeBackend
    from vllm.model_executor.layers.quantization import modelopt
    from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors_moe import (
        compressed_tensors_moe_w8a8_fp8,
    )

    for module in (modelopt, compressed_tensors_moe_w8a8_fp8):
        monkeypatch.setattr(module, "select_fp8_moe_backend", lambda **_: (Fp8MoeBackend.TRITON, None))
    make, config, method = FORMS[request.param]
    tensors, values = original(folders["scout"])
    stored, meant = make(tensors)
    if any(name.startswith("language_model.") for name in stored):
        values = reading_images(values)
    write(tmp_path, stored, values | {"quantization_config": config})
    with built(configured(tmp_path, hf_overrides=OURS, dtype="bfloat16"), tmp_path) as model:
        yield model, stored, meant, method


class TestFP8:
    """Loading only; computing needs a GPU, see below."""

    def test_what_is_loaded_is_what_the_file_means(self, quantised: Any) -> None:
        model, stored, meant, method = quantised
        assert_methods(method_names(model), method)
        for parameter in model.parameters():  # what is not loaded shows
            parameter.data.fill_(float("nan"))
        model.load_weights(stored.items())
        separate = one_by_one(meant)
        for layer in range(SHAPE["num_hidden_layers"]):
            path = f"model.layers.{layer}.feed_forward"
            routed = model.get_submodule(f"{path}.experts.layer.routed_experts")
            for expert in range(EXPERTS):
                found = [getattr(routed, name)[expert] for name in ROUTED]
                assert_means(separate, f"{path}.experts.{expert}", *found)
            found = [model.get_parameter(f"{path}.shared_expert.{name}") for name in SHARED]
            assert_means(separate, f"{path}.shared_expert", *found)
            if method == "ModelOptFp8MoEMethod":
                for ours, name in (("w13", "gate_up_proj"), ("w2", "down_proj")):
                    scale = stored[f"{path}.experts.{name}_input_scale"]
                    assert getattr(routed, f"{ours}_input_scale").eq(scale).all()
                cache = model.get_submodule(f"model.layers.{layer}.mixer.attention.attn")
                assert (cache.k_scale, cache.v_scale) == (0.25, 0.75)

    def test_strict(self, quantised: Any) -> None:
        """Remove or rename one tensor of every kind at a time."""
        model, stored, _, _ = quantised
        kinds = {re.sub(r"\d+", "0", name): name for name in stored if "layers.1." in name}
        for name in kinds.values():
            own = name.removeprefix("language_model.")
            some = {other: tensor for other, tensor in stored.items() if other != name}
            if name.endswith((".k_scale", ".v_scale")):
                model.load_weights(some.items())
                continue
            with pytest.raises(CheckpointError, match=r"missing: model\.layers\.1\."):
                model.load_weights(some.items())
            with pytest.raises(CheckpointError, match=f"unexpected: {re.escape(own)}_other$"):
                model.load_weights({**stored, f"{own}_other": stored[name]}.items())

    def test_shapes(self, quantised: Any) -> None:
        model, stored, _, _ = quantised
        scales = "model.layers.0.feed_forward.experts.gate_up_proj_weight_scale", torch.ones(EXPERTS)
        with pytest.raises(CheckpointError, match=r"gate_up_proj_weight_scale has shape \(4,\); of 4 experts in one"):
            model.load_weights([scales])
        name, weight = next(item for item in stored.items() if item[1].dtype == FP8)
        own = re.escape(name.removeprefix("language_model."))
        with pytest.raises(CheckpointError, match=rf"tensor {own} has shape .*, the config says"):
            model.load_weights([(name, weight.narrow(-1, 0, 32))])

    def test_other_stages(self, quantised: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        """A file contains the scales of other stages as well."""
        model, stored, _, _ = quantised
        monkeypatch.setitem(model.model.layers._modules, "3", PPMissingLayer())
        assert not any("layers.3." in name for name in model.load_weights(stored.items()))

    def test_both_layouts_at_once(self, quantised: Any, folders: dict[str, Path]) -> None:
        model, stored, _, _ = quantised
        own = {name.removeprefix("language_model.") for name in stored}
        tensors, _ = original(folders["scout"])
        name, tensor = next(item for item in (tensors | one_by_one(tensors)).items() if item[0] not in own)
        with pytest.raises(CheckpointError, match=f"tensor {re.escape(name)}: what it holds stands .* twice"):
            model.load_weights([*stored.items(), (name, tensor)])


@pytest.mark.skipif(ON_CPU, reason="FP8 is multiplied by GPUs")
def test_products_in_fp8(folders: dict[str, Path], tmp_path: Path) -> None:
    """Near what the file means, which activations in FP8 blur and another expert changes. The median: some of the
    tokens are sent to other experts."""
    from vllm import SamplingParams

    tensors, values = original(folders["scout"])
    stored, meant = in_ranges(one_by_one(tensors), is_feed_forward, LARGEST, FP8)
    routed = re.compile(r"experts\.(\d+)\.")
    turned = {routed.sub(lambda m: f"experts.{(int(m[1]) + 1) % EXPERTS}.", name): t for name, t in meant.items()}
    form = {"quantization_config": compressed("float", "float-quantized")}
    for name, file in (("meant", meant), ("turned", turned), ("stored", stored)):
        (tmp_path / name).mkdir()
        write(tmp_path / name, file, values | (form if name == "stored" else {}))
    (prompt,) = prompts_of(170)
    with serving(tmp_path / "stored", dtype="bfloat16") as llm:
        (methods,) = llm.apply_model(method_names)
        params = SamplingParams(max_tokens=1, prompt_logprobs=0)
        (output,) = llm.generate([{"prompt_token_ids": prompt}], params, use_tqdm=False)
    assert_methods(methods, "CompressedTensorsW8A8Fp8MoEMethod")
    rows = zip(output.prompt_logprobs[1:], prompt[1:], strict=True)
    said = torch.tensor([row[token].logprob for row, token in rows])

    def off(name: str) -> float:
        expected = (
            oracle(tmp_path / name)(prompt)[:-1].log_softmax(-1).gather(1, torch.tensor(prompt[1:])[:, None])[:, 0]
        )
        return float((said - expected).abs().median())

    assert off("meant") < off("turned") / 3


ROUTED = ("w13_weight", "w13_weight_scale", "w2_weight", "w2_weight_scale")
SHARED = ("gate_up_proj.weight", "gate_up_proj.weight_scale", "down_proj.weight", "down_proj.weight_scale")


def assert_means(separate: Mapping[str, Tensor], parent: str, *found: Tensor) -> None:
    """Check that merged gates and ups, and downs, with their scales equal the file's dequantised tensors."""
    gate_up, gate_up_scale, down, down_scale = (tensor.float() for tensor in found)
    gate, up = gate_up.unflatten(0, (2, -1)) * gate_up_scale.reshape(2, -1, 1)
    for name, weight in (("gate", gate), ("up", up), ("down", down * down_scale.reshape(-1, 1))):
        torch.testing.assert_close(weight.cpu(), separate[f"{parent}.{name}_proj.weight"])


class TestChecks:
    def of(self, folder: Path, **options: Any) -> Any:
        return configured(folder, **({"hf_overrides": OURS, "max_model_len": MAX_LEN} | options))

    def test_lamellas_experts_have_no_restrictions(self, folders: dict[str, Path]) -> None:
        assert self.of(folders["scout"], data_parallel_size=2).parallel_config.data_parallel_size == 2

    def test_vllms_are_spread_over_tensor_parallel_ranks(self, folders: dict[str, Path]) -> None:
        with refused("data_parallel_size=2: quantised experts, and those of enable_expert_parallel"):
            self.of(folders["scout"], enable_expert_parallel=True, data_parallel_size=2)
        config = self.of(folders["scout"], enable_expert_parallel=True)
        config.parallel_config.enable_eplb = True  # which vLLM itself refuses on CPUs
        with pytest.raises(ConfigError, match="enable_eplb: experts stay on the ranks"):
            Checks.verify_and_update_config(config)

    def test_forms_that_vllm_has_no_experts_in(self, folders: dict[str, Path], tmp_path: Path) -> None:
        tensors, values = original(folders["scout"])
        form = {"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0, "modules_to_not_convert": []}
        write(tmp_path, tensors, values | {"quantization_config": form})
        with refused("quantization='fbgemm_fp8': vLLM has no experts in this form"):
            self.of(tmp_path, dtype="bfloat16", allow_deprecated_quantization=True)
