"""Which class serves which architecture. Nothing is imported before it is asked for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from importlib import import_module
from importlib.metadata import entry_points
from typing import TYPE_CHECKING

from lamella.errors import ConfigError

if TYPE_CHECKING:
    from lamella.models.base import CausalLM

ENTRY_POINT_GROUP = "lamella.architectures"

_targets: dict[str, str | type[CausalLM]] = {
    "LlamaForCausalLM": "lamella.models.llama:LlamaForCausalLM",
    "Qwen3ForCausalLM": "lamella.models.qwen3:Qwen3ForCausalLM",
    "LlamaCanonForCausalLM": "lamella.models.llama_canon:LlamaCanonForCausalLM",
    "Apriel2ForCausalLM": "lamella.models.apriel2:Apriel2ForCausalLM",
    "Apriel2ForConditionalGeneration": "lamella.models.apriel2:Apriel2ForCausalLM",  # its text part
    "Llama4ForCausalLM": "lamella.models.llama4:Llama4ForCausalLM",
    "Llama4ForConditionalGeneration": "lamella.models.llama4:Llama4ForConditionalGeneration",
}
_aliases = {
    "llama": "LlamaForCausalLM",
    "LLaMAForCausalLM": "LlamaForCausalLM",  # in files of the first converters
    "qwen3": "Qwen3ForCausalLM",
    "LlamaCanon": "LlamaCanonForCausalLM",
    "apriel2_text": "Apriel2ForCausalLM",
    "apriel2": "Apriel2ForConditionalGeneration",
    "llama4_text": "Llama4ForCausalLM",
    "llama4": "Llama4ForConditionalGeneration",
}


class _Registry(Mapping[str, "type[CausalLM]"]):
    """The architectures by name, each imported when it is looked up. Setting a name registers it."""

    def __getitem__(self, name: str) -> type[CausalLM]:
        try:
            return resolve_architecture(name)
        except ConfigError as error:
            raise KeyError(str(error)) from error

    def __setitem__(self, name: str, target: str | type[CausalLM]) -> None:
        register_architecture(name, target)

    def __iter__(self) -> Iterator[str]:
        return iter(architectures())

    def __len__(self) -> int:
        return len(architectures())


MODEL_REGISTRY = _Registry()


def register_architecture(name: str, target: str | type[CausalLM], aliases: tuple[str, ...] = ()) -> None:
    """Make `target`, a `CausalLM` class or "module:Class", serve checkpoints whose `architectures` say `name`.

    Registering the same pair again is harmless; taking over a name is a `ConfigError`.
    """
    for taken in (name, *aliases):
        current = _targets.get(_aliases.get(taken, taken))
        if current is not None and _path(current) != _path(target):
            raise ConfigError(f"architecture {taken!r} is registered already, as {_path(current)}")
    _targets[name] = target
    _aliases.update(dict.fromkeys(aliases, name))


def registered() -> dict[str, str]:
    """All that has been registered, names and aliases, as "module:Class", for another process to register."""
    names = {**{name: name for name in _targets}, **_aliases}
    return {name: _path(_targets[target]) for name, target in names.items()}


def model_types() -> dict[str, str]:
    """What config files call the architectures in `model_type`, and what to resolve: the aliases, and the entry points
    whose name is not that of their class.
    """
    points = (point for point in entry_points(group=ENTRY_POINT_GROUP) if not point.value.endswith(f":{point.name}"))
    return {**{point.name: point.name for point in points}, **_aliases}


def architectures() -> list[str]:
    """The names that are known, those of installed entry points included."""
    return sorted({*_targets, *(point.name for point in entry_points(group=ENTRY_POINT_GROUP))})


def resolve_architecture(name: str) -> type[CausalLM]:
    """The class that serves `name`, an architecture or an alias; a `ConfigError` lists what exists."""
    name = _aliases.get(name, name)
    target = _targets.get(name)
    if target is None:
        target = next((point.value for point in entry_points(group=ENTRY_POINT_GROUP) if point.name == name), None)
    if target is None:
        raise ConfigError(
            f"architecture {name!r} is not known; there are: {', '.join(architectures())}; to add one: "
            "docs/adding_a_model.md, or run the model in vLLM"
        )
    if isinstance(target, str):
        module, _, attribute = target.partition(":")
        target = getattr(import_module(module), attribute)
    return target


def _path(target: str | type[CausalLM]) -> str:
    return target if isinstance(target, str) else f"{target.__module__}:{target.__qualname__}"
