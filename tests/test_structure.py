"""The tree keeps its shape: imports between packages, no cycles, and a public surface that does not change unseen."""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Iterator, Mapping
from dataclasses import fields
from functools import cache
from importlib import import_module
from pathlib import Path

import pytest

import lamella
from lamella.engine.options import EngineOptions
from lamella.engine.scheduler import Scheduler
from lamella.serve.llm import LLM

pytestmark = pytest.mark.unit
SOURCE = Path(lamella.__file__).parent
ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "structures.md"


def module_name(path: Path) -> str:
    parts = path.relative_to(SOURCE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in SOURCE.rglob("*.py")}


def walk(node: ast.AST, nested: bool) -> Iterator[tuple[ast.AST, bool]]:
    """The nodes that run, and whether each runs only when a function is called."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            continue
        inside = nested or isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef)
        yield child, nested
        yield from walk(child, inside)


@cache
def imports_of(module: str) -> tuple[frozenset[str], frozenset[str]]:
    """Return what a module imports when it is imported, and what it imports later."""
    found: tuple[set[str], set[str]] = set(), set()
    for node, nested in walk(ast.parse(MODULES[module].read_text()), False):
        if isinstance(node, ast.Import):
            found[nested].update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.module and not node.level, f"{module}: relative import"
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                found[nested].add(name if name in MODULES else node.module)
    return frozenset(found[0]), frozenset(found[1] - found[0])


def package(module: str) -> str:
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else parts[0]


def tables() -> list[dict[str, list[set[str]]]]:
    """The tables under "Import rules": first cell -> the names in each cell after it."""
    section = PAGE.read_text().split("## Import rules")[1].split("\n## ")[0]
    found: list[dict[str, list[set[str]]]] = []
    for line in section.splitlines():
        cells = [set(re.findall(r"`([\w.]+)`", re.sub(r"\(.*?\)", "", cell))) for cell in line.strip("|").split("|")]
        if re.match(r"\|-+\|", line):
            found.append({})
        elif line.startswith("| `"):
            (name,) = cells[0]
            found[-1][name] = cells[1:]
    assert len(found) == 2
    return found


def package_imports(later: bool) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {package(module): set() for module in MODULES}
    for module in MODULES:
        names = {package(name) for name in imports_of(module)[later] if name.split(".")[0] == "lamella"}
        found[package(module)] |= names - {package(module)}
    return found


def reachable(graph: Mapping[str, set[str]], start: str) -> set[str]:
    """Every node that a path of at least one edge leads to."""
    found: set[str] = set()
    todo = [start]
    while todo:
        new = graph.get(todo.pop(), set()) - found
        found |= new
        todo += new
    return found


def cycles(graph: Mapping[str, set[str]]) -> list[str]:
    """The nodes that can reach themselves."""
    return sorted(name for name in graph if name in reachable(graph, name))


def test_imports_between_packages_are_those_of_the_page():
    rules, now, later = tables()[0], package_imports(False), package_imports(True)
    assert {name: cells[0] for name, cells in rules.items()} == now
    assert {name: cells[1] for name, cells in rules.items()} == {name: later[name] - now[name] for name in later}


def test_optional_libraries_are_imported_where_the_page_says():
    for library, (allowed,) in tables()[1].items():
        for module in MODULES:
            now, later = ({name.split(".")[0] for name in names} for names in imports_of(module))
            if library in now | later:
                inside = [name for name in allowed if f"{module}.".startswith(f"lamella.{name}.")]
                assert inside, f"{module} imports {library}"


def test_importing_lamella_imports_no_optional_library():
    reached, todo = set(), {"lamella.serve.llm", "lamella.cli.main", "lamella.vllm_plugin", "lamella.parity.api"}
    while todo:
        module = todo.pop()
        reached.add(module)
        for name in imports_of(module)[0]:
            if name in MODULES:
                parents = {name.rsplit(".", count)[0] for count in range(name.count(".") + 1)}
                todo |= (parents & MODULES.keys()) - reached
            assert name.split(".")[0] not in tables()[1], f"{module} imports {name}"


def test_modules_have_no_import_cycle():
    assert cycles({module: set(imports_of(module)[0]) & MODULES.keys() for module in MODULES}) == []


def test_packages_have_no_import_cycle():
    assert cycles(package_imports(False)) == []


def test_cycles_are_found():
    assert cycles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) == ["a", "b", "c"]
    assert cycles({"a": {"b", "c"}, "b": {"c"}}) == []


PUBLIC = {
    "lamella": """
        AsyncLLM CheckpointError ClosedError CompletionOutput ConfigError EngineError KernelError LLM LamellaError
        Logprob ParameterError RequestOutput SamplingParams UserError WorkerError register_architecture
    """,
    "lamella.config": """
        AttentionConfig CanonConfig DynamicScaling FeedForwardConfig GatedDeltaNetConfig KimiDeltaConfig LayerConfig
        LinearScaling Llama3Scaling LongRopeScaling MLPConfig MambaConfig MixerConfig MoEConfig ModelConfig NormConfig
        Placement PlacementLike RopeConfig RopeScaling SingleMixerConfig StochasticConfig TemperatureConfig YarnScaling
        describe_placement main_placement mixer_names placed read_placement
    """,
    "lamella.models": """
        Apriel2ForCausalLM Architecture CausalLM Llama4ForCausalLM Llama4ForConditionalGeneration LlamaCanonForCausalLM
        LlamaForCausalLM MODEL_REGISTRY Qwen3ForCausalLM architectures register_architecture resolve_architecture
    """,
    "lamella.parity": "ParityOptions assert_parity bisect check compare paths score",
}
LLM_OPTIONS = """
    model tokenizer revision tokenizer_revision skip_tokenizer_init dtype load_format hf_overrides generation_config
    override_generation_config limit_mm_per_prompt seed max_model_len max_num_seqs max_num_batched_tokens max_logprobs
    gpu_memory_utilization block_size num_blocks enable_prefix_caching snapshot_bytes snapshot_interval
    snapshot_prompts device enforce_eager enable_compile round_norms_twice deterministic tensor_parallel_size
    enable_expert_parallel placement mixed_placements
"""


@pytest.mark.parametrize("name", PUBLIC)
def test_public_names_change_only_together_with_this_list(name):
    module = import_module(name)
    assert sorted(module.__all__) == PUBLIC[name].split()
    assert all(getattr(module, public) is not None for public in module.__all__)


def test_options_of_llm_change_only_together_with_this_list():
    assert list(inspect.signature(LLM).parameters) == [*LLM_OPTIONS.split(), "vllm_arguments"]
    assert {field.name for field in fields(EngineOptions)} == set(LLM_OPTIONS.split())


def test_defaults_of_llm_are_those_of_the_engine():
    declared = {field.name: field.default for field in fields(EngineOptions)}
    for name, parameter in inspect.signature(LLM).parameters.items():
        if parameter.default is not parameter.empty:
            assert parameter.default == declared[name], name
    scheduler = inspect.signature(Scheduler).parameters
    for name in ("snapshot_interval", "snapshot_prompts"):
        assert scheduler[name].default is inspect.Parameter.empty, f"{name}: the engine's options have the default"


@pytest.mark.parametrize("old", ["llm.LLM", "async_llm.AsyncLLM", "sampling_params.SamplingParams", "outputs.Logprob"])
def test_former_import_paths_lead_to_the_same_classes(old):
    module, name = old.split(".")
    assert getattr(import_module(f"lamella.engine.{module}"), name) is getattr(lamella, name)


SPINE = [
    "engine.scheduler",
    "engine.engine",
    "engine.steps.runner",
    "engine.steps.step_inputs",
    "layers.decoder",
    "layers.attention",
]
FEATURES = (
    r"placement|image|adapter|lora|grammar|stochastic|supernet|\bvision|torch\.compile|enable_compile|CompiledModel"
)


@pytest.mark.parametrize("module", SPINE)
def test_the_spine_names_no_feature(module):
    lines = MODULES[f"lamella.{module}"].read_text().splitlines()
    assert [line for line in lines if re.search(FEATURES, line, re.IGNORECASE)] == []


LONGEST = 500  # lines of a source file
LONG_FILES = {  # kernels, which are one piece
    "ops/short_conv/triton.py",
}


def test_no_source_file_is_too_long():
    lengths = {str(path.relative_to(SOURCE)): path.read_text().count("\n") for path in MODULES.values()}
    assert {name for name, length in lengths.items() if length > LONGEST} == LONG_FILES
    assert lengths["engine/engine.py"] <= 300


@pytest.mark.parametrize(("folder", "longest"), [("tests", 700), ("benchmarks", 500)])
def test_no_test_or_benchmark_is_too_long(folder, longest):
    lengths = {path: path.read_text().count("\n") for path in (ROOT / folder).rglob("*.py")}
    assert lengths
    assert [str(path) for path, length in lengths.items() if length > longest] == []
