"""Construction of an engine: load the model, plan memory, connect the parts and features."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pkgutil import resolve_name
from typing import Any

import torch

from lamella.checkpoint import load_model, open_checkpoint
from lamella.checkpoint.files import Checkpoint
from lamella.checkpoint.loader import named_dtype, resolve_dtype
from lamella.config import MoEConfig, Placement, read_placement
from lamella.config.placement import covering_placements
from lamella.engine.engine import Engine
from lamella.engine.images.embeddings import ImageEmbeddings
from lamella.engine.images.reader import ImageReader
from lamella.engine.memory import measure_steps, memory_budget, run_largest_step, warn_if_no_prefix_can_hit
from lamella.engine.options import EngineOptions
from lamella.engine.placements.pools import PoolSet
from lamella.engine.placements.step import PlacementStep
from lamella.engine.placements.switching import Placements
from lamella.engine.ranks.workers import WorkerProcesses, Workers
from lamella.engine.requests.admission import Admission
from lamella.engine.requests.defaults import read_defaults
from lamella.engine.requests.jobs import Jobs
from lamella.engine.requests.tokenizer import Tokenizer, load_tokenizer
from lamella.engine.scheduler import Scheduler
from lamella.engine.steps.features import StepFeature, StepFeatures
from lamella.engine.steps.runner import ModelRunner
from lamella.errors import ConfigError
from lamella.layers.compiled.model import CompiledModel
from lamella.layers.decoder import LanguageModel
from lamella.layers.local_kit import LocalKit
from lamella.layers.norm import RMSNorm
from lamella.layers.state_modules import SlotStateModule, find_state_modules
from lamella.layers.supernet.placing import activate, active_placement, has_choice
from lamella.parallel.group import Group
from lamella.parallel.sharding import Partition
from lamella.vision.image_model import ImageModel

logger = logging.getLogger("lamella")


def load_engine(options: EngineOptions, features: Sequence[StepFeature] = ()) -> Engine:
    """Build the engine of a checkpoint, or of a model that the caller constructed.

    Args:
        options: of the engine.
        features: additional step features, see docs/adding_an_engine_feature.md; only with one rank.

    Returns:
        The engine, ready for requests.

    Raises:
        ConfigError: an option or the checkpoint's config is not supported.
        CheckpointError: the checkpoint's tensors do not fit its config.
    """
    device = options.resolve_device()
    if isinstance(options.model, LanguageModel):
        model, tokenizer, eos = prepare_module(options.model, options, device)
        defaults = read_defaults(options, None)
        return build_engine(model, options, device, tokenizer, eos, features=features, defaults=defaults)
    if features and options.tensor_parallel_size > 1:
        raise ConfigError("features: only with tensor_parallel_size=1: other ranks would not have them")
    checkpoint = open_checkpoint(options.model, options.hf_overrides, options.revision)
    defaults = read_defaults(options, checkpoint.path)
    check_split(checkpoint, options)
    workers = WorkerProcesses(options, device) if options.tensor_parallel_size > 1 else Workers()
    with workers.guard():
        tokenizer = load_tokenizer(options, checkpoint.path)
        images = load_images(checkpoint, options, device, tokenizer)
        model = load_shard(checkpoint, options, device, workers.group)
        workers.connect(device)
        eos = checkpoint.eos_token_ids(model.config, None if tokenizer is None else tokenizer.eos_token_id)
        return build_engine(
            model, options, device, tokenizer, eos, workers, images=images, features=features, defaults=defaults
        )


def build_engine(
    model: LanguageModel,
    options: EngineOptions,
    device: torch.device,
    tokenizer: Tokenizer | None = None,
    eos_token_ids: tuple[int, ...] = (),
    workers: Workers | None = None,
    make_runner: Callable[..., ModelRunner] = ModelRunner,
    images: ImageModel | None = None,
    features: Sequence[StepFeature] = (),
    defaults: Mapping[str, Any] | None = None,
) -> Engine:
    """Build an engine around a loaded model.

    Args:
        model: shard of this rank.
        options: of the engine.
        device: of the model.
        tokenizer: of prompts and outputs; None if the model has none.
        eos_token_ids: tokens that end an output.
        workers: processes of the other ranks, which build the same engine around their shards.
        make_runner: constructor of the runner, with the arguments of `ModelRunner`.
        images: vision encoder, on rank 0; None: no images.
        features: additional step features.
        defaults: fields of `SamplingParams` for requests without sampling parameters.

    Returns:
        The engine, ready for requests.

    Raises:
        ConfigError: the options contradict the model, or its state does not fit into memory.
    """
    workers = workers or Workers()
    max_model_len = options.resolve_length(model.config)
    if options.placement is not None:
        activate(model, read_placement(options.placement, model.config))
    if options.mixed_placements and not has_choice(model):
        raise ConfigError("mixed_placements=True: no layer of the model has a choice of mixers; leave it out")
    dtype = model.get_parameter("model.embed_tokens.weight").dtype
    if options.round_norms_twice:
        round_norms_twice(model, dtype)
    embeddings = ImageEmbeddings(model.config.hidden_size, dtype, device, workers.group, images)
    budget = _memory_budget(model, options, max_model_len, device, workers.group, embeddings)
    pools = PoolSet(model, options, max_model_len, device, budget)
    current = pools.find(active_placement(model))
    pools.bind(current)
    warn_if_no_prefix_can_hit(options, current.cost, current.plan, max_model_len)
    scheduler = Scheduler(
        current.state,
        options.max_num_seqs,
        options.max_num_batched_tokens,
        options.snapshot_interval,
        _snapshot_prompts(options, device, current.state.has_slot_state),
        _can_snapshot_inside(model),
    )
    placement_step = PlacementStep(model)
    own: list[StepFeature] = [placement_step, embeddings] if has_choice(model) else [embeddings]
    forward = CompiledModel(model) if options.enable_compile else None
    runner = make_runner(
        model, current.state, device, max_model_len, options.max_num_seqs, StepFeatures([*own, *features]), forward
    )
    if options.enforce_eager and device.type != "cuda":
        logger.info("enforce_eager has no effect on this device, which has no CUDA graphs")
    runner.warm_up(graphs=not options.enforce_eager)
    workers.call_before_stop(runner.drop_graphs)
    workers.set_state(current.state)
    jobs = Jobs()
    variants = Placements(model, options, pools, current, placement_step, jobs, scheduler, runner, workers)
    reader = None if images is None else ImageReader(images, options.max_images)
    admission = Admission(
        model.config.vocab_size, options, tokenizer, eos_token_ids, max_model_len, jobs, variants, reader, defaults
    )
    return Engine(model, options, device, admission, variants, scheduler, runner, workers)


def _snapshot_prompts(options: EngineOptions, device: torch.device, has_slot_state: bool) -> str:
    """Resolve `snapshot_prompts="auto"` for a device; return "always", "never" or "busy"."""
    if options.snapshot_prompts != "auto":
        return options.snapshot_prompts
    if device.type != "cuda":
        return "always"
    if has_slot_state and options.enable_prefix_caching:
        logger.info(
            "prefix cache: the beginning of a prompt hits from the third request on; snapshot_prompts='always' makes "
            "it hit from the second on, at the cost of slower prefills of short prompts"
        )
    return "never"


def _can_snapshot_inside(model: LanguageModel) -> bool:
    """Return True if snapshots can be taken inside a chunk: every access to slot state is in a part of a mixer."""
    state_modules = [
        state_module for state_module in find_state_modules(model) if isinstance(state_module, SlotStateModule)
    ]
    without = [state_module.prefix for state_module in state_modules if not state_module.parts]
    if without:
        logger.warning(
            "prefix cache: %s reads its state outside of its parts, so snapshots are taken only at the ends of chunks; "
            "see docs/adding_a_mixer.md",
            without[0],
        )
    return not without


def _memory_budget(
    model: LanguageModel,
    options: EngineOptions,
    max_model_len: int,
    device: torch.device,
    group: Group,
    embeddings: ImageEmbeddings,
) -> int:
    """Measure the largest step of every placement, and return the bytes that remain for state."""

    def run(placement: Placement) -> None:
        activate(model, placement)
        run_largest_step(model, options, max_model_len, device)

    active = active_placement(model)
    runs: list[Callable[[], None]] = [
        embeddings.run_largest,
        *(partial(run, placement) for placement in covering_placements(model.config)),
    ]
    reserved = measure_steps(runs, embeddings.dtype, device)
    activate(model, active)
    return memory_budget(device, reserved, group, options.gpu_memory_utilization)


def check_split(checkpoint: Checkpoint, options: EngineOptions) -> None:
    """Check that the model can be sharded over the ranks. No tensor is loaded.

    Raises:
        ConfigError: the model cannot be sharded.
    """
    size, architecture = options.tensor_parallel_size, checkpoint.architecture
    path = architecture.import_path
    if size > 1 and (path is None or path.startswith("__main__:")):
        raise ConfigError(
            f"tensor_parallel_size={size}: {architecture.name} is defined in the main script or in no module, "
            "so other processes cannot import it; put it into a module"
        )
    config, whole_experts = checkpoint.read_config(), options.enable_expert_parallel
    if whole_experts and not any(isinstance(layer.feed_forward, MoEConfig) for layer in config.layers):
        raise ConfigError("enable_expert_parallel=True: no layer of the model has experts; leave it out")
    checkpoint.allocate(config, LocalKit(device="meta", group=Group(Partition(0, size)), expert_parallel=whole_experts))


def load_shard(checkpoint: Checkpoint, options: EngineOptions, device: torch.device, group: Group) -> LanguageModel:
    """Load the shard of a rank."""
    max_length = options.resolve_length(checkpoint.read_config())
    return load_model(
        checkpoint,
        options.dtype,
        device,
        options.load_format,
        max_length,
        options.seed_number,
        group,
        options.enable_expert_parallel,
    )


def find_image_model(checkpoint: Checkpoint, load_format: str) -> type[ImageModel] | None:
    """Return the vision encoder class of a checkpoint; None for a text model. No tensor is read.

    Raises:
        ConfigError: the config and the tensors contradict each other.
        CheckpointError: the files cannot be read.
    """
    path = checkpoint.architecture.image_model
    if path is None:
        return None
    found: type[ImageModel] = resolve_name(path)
    return found if found.has_encoder(checkpoint, load_format) else None


def load_images(
    checkpoint: Checkpoint, options: EngineOptions, device: torch.device, tokenizer: Tokenizer | None
) -> ImageModel | None:
    """Load the vision encoder; return None if the model has none, or the options allow no images.

    Raises:
        ConfigError: `limit_mm_per_prompt` is given for a model without a vision encoder.
    """
    loader, limit = find_image_model(checkpoint, options.load_format), options.limit_mm_per_prompt
    if loader is None:
        if limit is not None:
            raise ConfigError(f"limit_mm_per_prompt={dict(limit)!r}: the checkpoint of {options.model} reads no images")
        return None
    if options.max_images == 0:
        logger.info("%s: limit_mm_per_prompt allows no images, so the vision encoder is not loaded", checkpoint.path)
        return None
    dtype = resolve_dtype(checkpoint, options.dtype)
    token_id = tokenizer.token_id if tokenizer is not None else lambda text: None
    return loader.load(checkpoint, dtype, device, token_id, options.load_format, options.seed_number)


def round_norms_twice(model: LanguageModel, dtype: torch.dtype) -> None:
    """Make the RMS norms of a 16-bit model round as in `transformers`: before the weight, too.

    Raises:
        ConfigError: the model is float32, where there is no rounding to change.
    """
    if dtype == torch.float32:
        raise ConfigError("round_norms_twice=True: without effect on a float32 model; leave it out")
    for module in model.modules():
        if isinstance(module, RMSNorm):
            module.round_twice = True


def prepare_module(
    model: LanguageModel, options: EngineOptions, device: torch.device
) -> tuple[LanguageModel, Tokenizer | None, tuple[int, ...]]:
    """Prepare a model that the caller constructed: move it to `device`, convert it to `dtype`, set it to `eval`.

    Returns:
        The model itself, the tokenizer of the options, and the tokens that end an output.
    """
    model.to(device=device, dtype=None if options.dtype == "auto" else named_dtype(options.dtype))
    model.eval().requires_grad_(False)
    tokenizer = load_tokenizer(options, None)
    named = () if tokenizer is None or tokenizer.eos_token_id is None else (tokenizer.eos_token_id,)
    known = (token for token in (*model.config.eos_token_ids, *named) if token < model.config.vocab_size)
    return model, tokenizer, tuple(dict.fromkeys(known))
