"""`transformers` as an engine: one full forward. The only place that imports it."""

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
from lamella.parity.reference_model import tap_turned
from lamella.parity.scorers.full_forward import FullForward
from lamella.parity.scores import Settings
from lamella.parity.sites import Tap, untouched
from lamella.parity.tested_model import TestedModel
from lamella.validation import listed

_TAPPED = "lamella_tapped"
_OTHER = "--oracle reference names the tensors that do not fit the config"


def open_scorer(tested: TestedModel, settings: Settings) -> FullForward:
    return FullForward("hf", HFModel(tested, settings).logits)


def why_not(tested: TestedModel) -> str | None:
    """Why `transformers` cannot be asked about a model; None where it can."""
    if tested.load_format == "dummy":
        return "dummy weights are in no file that transformers could read"
    if tested.checkpoint.quantization is not None:
        return "of a quantised file transformers would quantise activations too, or compute another way"
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
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:  # one that the vLLM plugin has registered, for instance
        return f"transformers has a config but no language model for {config.model_type}"
    return None


class HFModel:
    """A model of `transformers`, whose operations can be tapped under our names."""

    def __init__(self, tested: TestedModel, settings: Settings) -> None:
        if (why := why_not(tested)) is not None:
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
        """Logits (n, vocab) in the model's dtype; see `ReferenceModel.logits`."""
        ids = torch.tensor([list(token_ids)], device=self._device)
        if tap is untouched:
            return self._model(ids, use_cache=False).logits[0]
        with self._tapped(tap):
            return self._model(ids, use_cache=False).logits[0]

    @contextmanager
    def _tapped(self, tap: Tap) -> Iterator[None]:
        """Within the block every operation that stands in a module, or that attention sees, goes through `tap`.

        A checkpoint's tensors are named after the modules that own them, so its names find the modules too.
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
    """The hooks of one module of `transformers`, which works on (1, n, ...), or, among experts, on (n, channels)."""

    def flat(at: str, value: Tensor) -> Tensor:
        # A copy goes on, since some of it is added to in place.
        return tap(at, value.reshape(value.shape[value.dim() > 2], -1)).view(value.shape).clone()

    parent, _, name = site.rpartition(".")
    if (special := {"router": _router_hook, "experts": _experts_hook}.get(name)) is not None:
        return [module.register_forward_hook(special(site, tap))]
    hooks = [module.register_forward_hook(lambda _, args, output: flat(site, output))]
    if name in ("mixer_norm", "feed_forward_norm", "norm"):
        # The stream also goes around the norm, where no hook can reach it: it is seen here, and not replaced.
        hooks.append(module.register_forward_pre_hook(lambda _, args: (flat(f"{site}.residual", args[0]),)))
    if name in FED_BY:
        hooks.append(module.register_forward_pre_hook(lambda _, args: (flat(f"{parent}.{FED_BY[name]}", args[0]),)))
    return hooks


def _router_hook(site: str, tap: Tap) -> Any:
    """Llama 4's router gives the weights of all experts, zero where not chosen, and the logits that are the site."""

    def hook(module: Any, _: Any, output: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        logits = tap(site, output[1])
        chosen, ids = logits.topk(module.top_k, dim=1)
        weights = torch.full_like(logits, -torch.inf).scatter(1, ids, chosen)
        return torch.sigmoid(weights.float()).to(logits.dtype), logits

    return hook


def _experts_hook(site: str, tap: Tap) -> Any:
    """Llama 4's experts give (E * n, channels), whose sum over E is the site."""

    def hook(module: Any, _: Any, output: Tensor) -> Tensor:
        each = output.unflatten(0, (module.num_experts, -1))
        total = tap(site, each.sum(0))
        return torch.cat((total[None], torch.zeros_like(each[1:]))).flatten(0, 1)

    return hook


def _tapped_attention(tap: Tap, mixers: Sequence[Any]) -> Any:
    """Eager attention under `transformers`' interface, which hands over queries and keys after their rotation."""

    def attend(
        module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, scaling: float, **_: Any
    ) -> tuple[Tensor, None]:
        name = f"layers.{module.layer_idx}.mixer"
        heads = [query.shape[1], key.shape[1]]
        seen = torch.cat((query, key), 1)[0].transpose(0, 1)  # (n, heads, D)
        seen = tap_turned(tap, name, mixers[module.layer_idx], seen)
        query, key = seen.transpose(0, 1)[None].split(heads, 1)
        key, value = (side.repeat_interleave(heads[0] // heads[1], 1) for side in (key, value))
        scores = query @ key.transpose(2, 3) * scaling
        if attention_mask is not None:
            scores = scores + attention_mask
        x_fp32 = torch.promote_types(query.dtype, torch.float32)
        output = (scores.softmax(-1, dtype=x_fp32).to(query.dtype) @ value).transpose(1, 2)  # (1, n, H, D)
        return tap(f"{name}.attention", output[0].flatten(1)).view(output.shape), None

    return attend
