"""Registry of architectures by name. A module of `models/` is imported when its architecture is first looked up."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from importlib.metadata import entry_points
from pkgutil import resolve_name
from typing import TYPE_CHECKING, TypeAlias

from lamella.errors import ConfigError
from lamella.models.architecture import Architecture

if TYPE_CHECKING:
    from lamella.models.base import CausalLM

ENTRY_POINT_GROUP = "lamella.architectures"

# A description, a `CausalLM` subclass, or "module:name" of either.
Target: TypeAlias = "str | Architecture | type[CausalLM]"

_targets: dict[str, Target] = {
    "LlamaForCausalLM": "lamella.models.llama:LLAMA",
    "Qwen3ForCausalLM": "lamella.models.qwen3:QWEN3",
    "LlamaCanonForCausalLM": "lamella.models.llama_canon:LLAMA_CANON",
    "Apriel2ForCausalLM": "lamella.models.apriel2:APRIEL2",
    "Apriel2ForConditionalGeneration": "lamella.models.apriel2:APRIEL2",  # text part only
    "Llama4ForCausalLM": "lamella.models.llama4:LLAMA4",
    "Llama4ForConditionalGeneration": "lamella.models.llama4:LLAMA4_WITH_IMAGES",
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
    """Model classes by the architecture's name. Setting a name registers it."""

    def __getitem__(self, name: str) -> type[CausalLM]:
        try:
            return resolve_architecture(name)
        except ConfigError as error:
            raise KeyError(str(error)) from error

    def __setitem__(self, name: str, target: Target) -> None:
        register_architecture(name, target)

    def __iter__(self) -> Iterator[str]:
        return iter(architectures())

    def __len__(self) -> int:
        return len(architectures())


MODEL_REGISTRY = _Registry()


def register_architecture(name: str, target: Target, aliases: tuple[str, ...] = ()) -> None:
    """Register an architecture for checkpoints whose `architectures` contain `name`.

    Registering the same target again has no effect.

    Args:
        name: the architecture's name in `config.json`.
        target: an `Architecture`, a `CausalLM` class, or "module:name" of either. With `tensor_parallel_size` > 1 it
            must be importable in other processes.
        aliases: other names, such as the `model_type` of config files.

    Raises:
        ConfigError: a name is already registered with another target.
    """
    for requested in (name, *aliases):
        current = _targets.get(_aliases.get(requested, requested))
        if current is not None and not _is_same(current, target):
            raise ConfigError(f"architecture {requested!r} is registered already, as {_path(current)}")
    _targets[name] = target
    _aliases.update(dict.fromkeys(aliases, name))


def registered() -> dict[str, str]:
    """Return every registered name and alias with its "module:name", so that another process can register it.

    Descriptions that are not an attribute of a module are omitted, because other processes cannot import them.
    """
    names = {**{name: name for name in _targets}, **_aliases}
    paths = {name: _path(_targets[target]) for name, target in names.items()}
    return {name: path for name, path in paths.items() if path is not None}


def model_types() -> dict[str, str]:
    """Return the name to look up for each `model_type` of config files.

    They are the aliases and the entry points whose name differs from the name of their object.
    """
    points = (point for point in entry_points(group=ENTRY_POINT_GROUP) if not point.value.endswith(f":{point.name}"))
    return {**{point.name: point.name for point in points}, **_aliases}


def architectures() -> list[str]:
    """Return all registered names, including installed entry points, sorted."""
    return sorted({*_targets, *(point.name for point in entry_points(group=ENTRY_POINT_GROUP))})


def find_architecture(name: str) -> Architecture:
    """Return the description of `name`, an architecture or an alias.

    Raises:
        ConfigError: the name is unknown; the message lists the known names.
    """
    name = _aliases.get(name, name)
    target = _targets.get(name)
    if target is None:
        target = next((point.value for point in entry_points(group=ENTRY_POINT_GROUP) if point.name == name), None)
    if target is None:
        raise ConfigError(
            f"architecture {name!r} is not known; there are: {', '.join(architectures())}; to add one: "
            "docs/adding_a_model.md, or run the model in vLLM"
        )
    return _describe(target)


def resolve_architecture(name: str) -> type[CausalLM]:
    """Return the model class of `name`, an architecture or an alias; see `find_architecture`."""
    from lamella.models.base import model_class

    return model_class(find_architecture(name))


def _describe(target: Target) -> Architecture:
    """Return the description of a target; import it if it is a path."""
    found = resolve_name(target) if isinstance(target, str) else target
    return found if isinstance(found, Architecture) else found.description


def _is_same(first: Target, second: Target) -> bool:
    """Return True if both targets are the same description, or versions of it. Equal paths are not imported."""
    if _path(first) == _path(second) is not None:
        return True
    if isinstance(first, Architecture) and isinstance(
        second, Architecture
    ):  # a notebook cell that runs twice creates two objects
        same_module = first.read_config.__module__ == second.read_config.__module__
        return first is second or (same_module and first.name == second.name)
    try:
        return _describe(first) is _describe(second)
    except (ImportError, AttributeError):
        return False


def _path(target: Target) -> str | None:
    if isinstance(target, str):
        return target
    if isinstance(target, Architecture):
        return target.import_path
    return f"{target.__module__}:{target.__qualname__}"
