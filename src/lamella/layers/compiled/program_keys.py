"""Program keys of a model's parts: parts with equal keys run the same operations on tensors of the same shapes."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator
from dataclasses import replace

from torch import nn

from lamella.config import AttentionConfig, LayerConfig
from lamella.config.placement import every_mixer
from lamella.layers.attention import Attention
from lamella.layers.compiled.attention import AttentionForm, apply_form
from lamella.layers.decoder import DecoderLayer, LanguageModel
from lamella.layers.supernet.stochastic import Stochastic


def mixer_program_keys(model: LanguageModel) -> dict[nn.Module, Hashable]:
    """Return the program key of the attention part for each mixer of the model.

    Attention layers that differ only in position-dependent operations or in their visible range get one key if a form
    covers them all. These layers are changed in place by `apply_form`; their results stay bitwise equal.
    """
    keys: dict[nn.Module, Hashable] = {}
    by_key: dict[Hashable, list[Attention]] = {}
    for layer, config in _layers(model):
        around = (config.norm, config.mixer_canon)
        mixers = layer.mixer.mixers.values() if isinstance(layer.mixer, Stochastic) else (layer.mixer,)
        for mixer, own in zip(mixers, every_mixer(config.mixer), strict=True):
            if isinstance(mixer, Attention):
                by_key.setdefault((around, _without_positions(mixer.config)), []).append(mixer)
            else:
                keys[mixer] = around, own
    for key, attentions in by_key.items():
        forms = _merge_forms(AttentionForm.from_config(attention.config) for attention in attentions)
        for attention in attentions:
            own_form = AttentionForm.from_config(attention.config)
            index = next(index for index, (form, _) in enumerate(forms) if form.covers(own_form))
            form, several = forms[index]
            if several:
                apply_form(attention, form)
            keys[attention] = key, index
    return keys


def feed_forward_program_keys(model: LanguageModel) -> dict[nn.Module, Hashable]:
    """Return the program key of each layer's feed-forward part."""
    return {layer: (config.norm, config.feed_forward_canon, config.feed_forward) for layer, config in _layers(model)}


def _layers(model: LanguageModel) -> Iterator[tuple[DecoderLayer, LayerConfig]]:
    for layer, config in zip(model.model.layers, model.config.layers, strict=True):
        assert isinstance(layer, DecoderLayer)
        yield layer, config


def _without_positions(config: AttentionConfig) -> AttentionConfig:
    """Return the config without the operations of `AttentionForm` and without options of the attention op itself."""
    qk_norm = config.qk_norm if config.qk_norm_weight else None
    return replace(config, qk_norm=qk_norm, rope=None, temperature=None, window=None, chunk=None, scale=1.0)


def _merge_forms(forms: Iterable[AttentionForm]) -> list[tuple[AttentionForm, bool]]:
    """Merge forms greedily into few forms that cover all of them.

    Returns:
        The merged forms, each with True if it covers more than one of the given forms.
    """
    found: list[tuple[AttentionForm, bool]] = []
    for form in dict.fromkeys(forms):
        for index, (other, _) in enumerate(found):
            if (both := form.join(other)) is not None:
                found[index] = both, True
                break
        else:
            found.append((form, False))
    return found
