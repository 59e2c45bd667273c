"""`transformers` as a scorer and as the reference: one full forward per sequence, without cache.

The only module of the kit that imports `transformers`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lamella.checkpoint.names import targets
from lamella.errors import CheckpointError, ConfigError
from lamella.models.names import rename
from lamella.parity.probe import FED_BY
from lamella.parity.reference_model import tap_queries_keys
from lamella.parity.scorers.full_forward import FullForward
from lamella.parity.scores import Settings
from lamella.parity.sites import Tap, untouched
from lamella.parity.tested_model import ModelUnderTest
from lamella.validation import listed

_TAPPED = "lamella_tapped"
_OTHER = "--reference reference names the tensors that do not fit the config"


def open_scorer(tested: ModelUnderTest, settings: Settings) -> FullForward:
    """Open a scorer that computes with `transformers`."""
    return FullForward("hf", HFModel(tested, settings).logits)


def why_unsupported(tested: ModelUnderTest) -> str | None:
    """Return the reason why `transformers` cannot be used for a model; None if it can."""
    if tested.load_format == "dummy":
        return "dummy weights are in no file that transformers could read"
    if tested.checkpoint.quantization is not None:
        return "transformers computes a quantised checkpoint in another way, such as with quantised activations"
    try:
        from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig
    except ImportError:
        return "transformers is not installed (pip install 'lamella[hf]')"
    try:
        config = AutoConfig.from_pretrained(tested.folder, trust_remote_code=False)
    except ConfigError as error:
        return str(error)
    except (ValueError, KeyError, OSError) as error:
        return f"transformers does not know the model ({str(error).strip().splitlines()[0]})"
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:  # for example a config that the vLLM plugin registered
        return f"transformers has a config but no language model for {config.model_type}"
    return None


class HFModel:
    """Model of `transformers` whose operations can be tapped under lamella's site names.

    Raises:
        ConfigError: `transformers` does not support the model.
        CheckpointError: `transformers` cannot load the checkpoint.
    """

    def __init__(self, tested: ModelUnderTest, settings: Settings) -> None:
        if (why := why_unsupported(tested)) is not None:
            raise ConfigError(f"hf: {why}; `reference` needs neither")
        from transformers import AutoModelForCausalLM
        from transformers.utils import logging

        logging.disable_progress_bar()
        path = tested.checkpoint.path
        try:
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                tested.folder,
                dtype=settings.dtype,
                attn_implementation=settings.attention,
                output_loading_info=True,
            )
        except (RuntimeError, ValueError, KeyError, OSError) as error:
            reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
            raise CheckpointError(f"{path}: transformers cannot load it ({reason}); {_OTHER}") from error
        model, found = loaded
        if missing := sorted(found["missing_keys"]):  # transformers would fill these at random
            raise CheckpointError(f"{path}: tensors that transformers misses: {listed(missing)}; {_OTHER}")
        self._model = model.eval().requires_grad_(False).to(settings.device)
        self._names, self._device = tested.checkpoint.names, settings.device
        self._mixers = [layer.mixer for layer in tested.config.layers]
        owners = (path.rpartition(".")[0] for path in targets(tested.skeleton(), {}))
        self._paths = dict.fromkeys((*owners, "lm_head"))  # a tied head owns no tensor

    @torch.inference_mode()
    def logits(self, token_ids: Sequence[int], tap: Tap = untouched) -> Tensor:
        """Return logits (n, vocab_size) in the model's dtype; see `ReferenceModel.logits`."""
        ids = torch.tensor([list(token_ids)], device=self._device)
        if tap is untouched:
            return self._model(ids, use_cache=False).logits[0]
        with self._tapped(tap):
            return self._model(ids, use_cache=False).logits[0]

    @contextmanager
    def _tapped(self, tap: Tap) -> Iterator[None]:
        """Pass the output of every module, and the inputs of attention, through `tap` inside a `with` block.

        The mapping of tensor names also maps module paths, because a tensor is named after its module.
        """
        from transformers import AttentionInterface
        from transformers.masking_utils import AttentionMaskInterface, eager_mask

        AttentionInterface.register(_TAPPED, _tapped_attention(tap, self._mixers))
        AttentionMaskInterface.register(_TAPPED, eager_mask)
        before = self._model.config._attn_implementation
        modules = dict(self._model.named_modules())
        handles: list[Any] = []
        for path in self._paths:
            if (module := modules.get(rename(path, self._names))) is not None:
                handles += _hooks(module, path.removeprefix("model."), tap)
        self._model.set_attn_implementation(_TAPPED)
        try:
            yield
        finally:
            self._model.set_attn_implementation(before)
            for handle in handles:
                handle.remove()


def _hooks(module: nn.Module, site: str, tap: Tap) -> list[Any]:
    """Register the hooks of one module, whose values are (1, n, ...), or (n, channels) inside a mixture of experts."""

    def flat(at: str, value: Tensor) -> Tensor:
        # Continue with a copy: later code adds to some of these values in place.
        return tap(at, value.reshape(value.shape[value.dim() > 2], -1)).view(value.shape).clone()

    parent, _, name = site.rpartition(".")
    if (special := {"router": _router_hook, "experts": _experts_hook}.get(name)) is not None:
        return [module.register_forward_hook(special(site, tap))]
    hooks = [module.register_forward_hook(lambda _, args, output: flat(site, output))]
    if name in ("mixer_norm", "feed_forward_norm", "norm"):
        # The residual stream also bypasses the norm, where no hook sees it. It is recorded here but cannot be replaced.
        hooks.append(module.register_forward_pre_hook(lambda _, args: (flat(f"{site}.residual", args[0]),)))
    if name in FED_BY:
        hooks.append(module.register_forward_pre_hook(lambda _, args: (flat(f"{parent}.{FED_BY[name]}", args[0]),)))
    return hooks


def _router_hook(site: str, tap: Tap) -> Any:
    """Return a hook for Llama 4's router, which outputs (weights of all experts, logits); the site is the logits."""

    def hook(module: Any, _: Any, output: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        logits = tap(site, output[1])
        chosen, ids = logits.topk(module.top_k, dim=1)
        weights = torch.full_like(logits, -torch.inf).scatter(1, ids, chosen)
        return torch.sigmoid(weights.float()).to(logits.dtype), logits

    return hook


def _experts_hook(site: str, tap: Tap) -> Any:
    """Return a hook for Llama 4's experts, which output (E * n, channels); the site is the sum over E."""

    def hook(module: Any, _: Any, output: Tensor) -> Tensor:
        each = output.unflatten(0, (module.num_experts, -1))
        total = tap(site, each.sum(0))
        return torch.cat((total[None], torch.zeros_like(each[1:]))).flatten(0, 1)

    return hook


def _tapped_attention(tap: Tap, mixers: Sequence[Any]) -> Any:
    """Return eager attention with `transformers`' interface, which passes queries and keys after the rotation."""

    def attend(
        module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, scaling: float, **_: Any
    ) -> tuple[Tensor, None]:
        name = f"layers.{module.layer_idx}.mixer"
        heads = [query.shape[1], key.shape[1]]
        seen = torch.cat((query, key), 1)[0].transpose(0, 1)  # (n, heads, D)
        seen = tap_queries_keys(tap, name, mixers[module.layer_idx], seen)
        query, key = seen.transpose(0, 1)[None].split(heads, 1)
        key, value = (side.repeat_interleave(heads[0] // heads[1], 1) for side in (key, value))
        scores = query @ key.transpose(2, 3) * scaling
        if attention_mask is not None:
            scores = scores + attention_mask
        compute_dtype = torch.promote_types(query.dtype, torch.float32)
        output = (scores.softmax(-1, dtype=compute_dtype).to(query.dtype) @ value).transpose(1, 2)  # (1, n, H, D)
        return tap(f"{name}.attention", output[0].flatten(1)).view(output.shape), None

    return attend
