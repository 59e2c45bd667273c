"""Kinds of a model's parts: parts of one kind run the same operations on tensors of the same shapes."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator
from dataclasses import replace

from torch import nn

from lamella.config import AttentionConfig, LayerConfig
from lamella.config.placement import every_mixer
from lamella.layers.attention import Attention
from lamella.layers.compiled.attention import AttentionForm, take_form
from lamella.layers.decoder import DecoderLayer, LanguageModel
from lamella.layers.supernet.stochastic import Stochastic


def mixer_kinds(model: LanguageModel) -> dict[nn.Module, Hashable]:
    """Return the kind of the attention part with each mixer of the model.

    Attention layers that differ in what they do by positions, and in what they see, are made one kind where there is a
    form for all of them (`take_form`), which changes none of their results.
    """
    kinds: dict[nn.Module, Hashable] = {}
    similar: dict[Hashable, list[Attention]] = {}
    for layer, config in _layers(model):
        around = (config.norm, config.mixer_canon)
        mixers = layer.mixer.mixers.values() if isinstance(layer.mixer, Stochastic) else (layer.mixer,)
        for mixer, own in zip(mixers, every_mixer(config.mixer), strict=True):
            if isinstance(mixer, Attention):
                similar.setdefault((around, _without_positions(mixer.config)), []).append(mixer)
            else:
                kinds[mixer] = around, own
    for kind, alike in similar.items():
        forms = _covering(AttentionForm.from_config(attention.config) for attention in alike)
        for attention in alike:
            own_form = AttentionForm.from_config(attention.config)
            index = next(index for index, (form, _) in enumerate(forms) if form.covers(own_form))
            form, several = forms[index]
            if several:
                take_form(attention, form)
            kinds[attention] = kind, index
    return kinds


def feed_forward_kinds(model: LanguageModel) -> dict[nn.Module, Hashable]:
    """Return the kind of each layer's feed-forward part."""
    return {layer: (config.norm, config.feed_forward_canon, config.feed_forward) for layer, config in _layers(model)}


def _layers(model: LanguageModel) -> Iterator[tuple[DecoderLayer, LayerConfig]]:
    for layer, config in zip(model.model.layers, model.config.layers, strict=True):
        assert isinstance(layer, DecoderLayer)
        yield layer, config


def _without_positions(config: AttentionConfig) -> AttentionConfig:
    """Return a layer's config without its form, and without what only attention itself has to know."""
    qk_norm = config.qk_norm if config.qk_norm_weight else None
    return replace(config, qk_norm=qk_norm, rope=None, temperature=None, window=None, chunk=None, scale=1.0)


def _covering(forms: Iterable[AttentionForm]) -> list[tuple[AttentionForm, bool]]:
    """Return few forms, one of which covers each of these, each with whether it stands for several."""
    found: list[tuple[AttentionForm, bool]] = []
    for form in dict.fromkeys(forms):
        for index, (other, _) in enumerate(found):
            if (both := form.join(other)) is not None:
                found[index] = both, True
                break
        else:
            found.append((form, False))
    return found
