"""Mixture of experts: routed experts and an optional shared expert that every token uses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from lamella.config import MLPConfig, MoEConfig
from lamella.layers.feed_forward import MLP
from lamella.layers.kit import Kit
from lamella.layers.linear import Fp32Linear
from lamella.layers.parameters import ParameterLayout, SeparateTensor
from lamella.layers.sublayer_input import SublayerInput
from lamella.ops import moe
from lamella.ops.backend import use_fused
from lamella.ops.moe.reference import route
from lamella.parallel.sharding import Split


class MoE(nn.Module):
    """Mixture of experts `shared(x) + sum over e of expert_e(w_e x)`, see `MoEConfig`.

    The router is replicated on every rank; the experts are sharded. One all-reduce sums the outputs of the routed
    experts and of the shared expert together.
    """

    def __init__(self, config: MoEConfig, kit: Kit, hidden_size: int, prefix: str) -> None:
        super().__init__()
        self.group = kit.group
        whole = Split.whole(hidden_size), Split.whole(config.num_experts)
        self.router = Fp32Linear(*whole, False, kit.dtype, kit.device)
        self.experts = kit.experts(config, hidden_size, f"{prefix}.experts")
        self.shared_expert: MLP | None = None
        if config.shared_size is not None:
            shared = MLPConfig(intermediate_size=config.shared_size)
            self.shared_expert = MLP(shared, kit, hidden_size, f"{prefix}.shared_expert", None, reduce=False)

    def forward(self, entry: SublayerInput) -> Tensor:
        """Return the output (T, hidden_size) for an input (T, hidden_size)."""
        x = entry.tensor()
        logits = self.router(x)
        shared = None if self.shared_expert is None else self.shared_expert(entry)
        if shared is None:
            return self.group.all_reduce(self.experts(x, logits))
        if use_fused(x):
            return self.group.all_reduce(self.experts(x, logits, shared))
        return self.group.all_reduce(shared + self.experts(x, logits))

    @staticmethod
    def custom_routing_function(
        hidden_states: Tensor, gating_output: Tensor, topk: int, renormalize: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Select the experts of each token; signature of vLLM's `custom_routing_function`.

        Args:
            hidden_states: (T, hidden_size), unused.
            gating_output: (T, E) router logits.
            topk: experts per token.
            renormalize: must be False, because a weight is the sigmoid of its own logit.

        Returns:
            Weights (T, topk) fp32 and expert ids (T, topk) int32.

        Raises:
            ValueError: `renormalize` is True.
        """
        if renormalize:
            raise ValueError("renormalize=True: a weight is the sigmoid of its own logit, whatever the others are")
        ids, weights = route(gating_output, topk)
        return weights, ids.int()


class Experts(nn.Module):
    """Routed experts of this rank.

    With tensor parallelism a rank holds a shard of every expert; with expert parallelism it holds some whole experts.

    The parameters have the shapes of Llama 4's files. They are transposed views: in memory the input channels are
    contiguous, as in any projection. Other files store the projections of each expert as separate tensors, see
    `_separate`.

    Attributes:
        gate_up_proj: (E, hidden, 2 * I), gates first.
        down_proj: (E, I, hidden).
        own: the experts of this rank.
        channels: the intermediate channels of each expert on this rank.
    """

    def __init__(self, config: MoEConfig, kit: Kit, hidden_size: int, whole: bool = False) -> None:
        super().__init__()
        self.top_k = config.top_k
        if whole:
            self.own = kit.partition.nearly_even(config.num_experts, "num_local_experts")
            self.channels = Split.whole(config.intermediate_size)
        else:
            self.own = Split.whole(config.num_experts)
            self.channels = kit.partition.even(config.intermediate_size, "intermediate_size")
        count, inner = self.own.size, self.channels.size

        def parameter(outputs: int, inputs: int) -> nn.Parameter:
            weight = torch.empty(count, outputs, inputs, dtype=kit.dtype, device=kit.device)
            return nn.Parameter(weight.transpose(1, 2))

        self.gate_up_proj, self.down_proj = parameter(2 * inner, hidden_size), parameter(hidden_size, inner)
        hidden = Split.whole(hidden_size)
        self.layouts = {
            "gate_up_proj": ParameterLayout(
                (self.own, hidden, Split.join((self.channels, self.channels))),
                separate=partial(self._separate, ("gate_proj", "up_proj")),
            ),
            "down_proj": ParameterLayout((self.own, self.channels), separate=partial(self._separate, ("down_proj",))),
        }

    def forward(self, x: Tensor, logits: Tensor, base: Tensor | None = None) -> Tensor:
        """Return the weighted sum of the experts' outputs.

        Args:
            x: (T, hidden).
            logits: (T, E) router logits over the experts of all ranks.
            base: (T, hidden) to add to the result, or None.

        Returns:
            (T, hidden), this rank's partial sum.
        """
        gate_up, down = self.gate_up_proj.transpose(1, 2), self.down_proj.transpose(1, 2)
        return moe.experts(x, logits, self.top_k, gate_up, down, base, self.first)

    @property
    def first(self) -> int:
        """Index of the first expert of this rank."""
        return self.own.spans[0][0]

    def _separate(self, names: Sequence[str], parameter: Tensor) -> Mapping[str, SeparateTensor]:
        """Return the per-expert tensors that some files store instead of one parameter (E, inputs, outputs).

        Args:
            names: projections concatenated in the parameter: `gate_proj` and `up_proj`, or `down_proj`.
            parameter: `gate_up_proj` or `down_proj`.

        Returns:
            The tensors (outputs, inputs) by name, such as `7.gate_proj.weight`. The target of a tensor is empty if its
            expert belongs to another rank.
        """
        weights = parameter.detach().transpose(1, 2)
        hidden = Split.whole(weights.shape[2 if len(names) > 1 else 1])
        splits = (self.channels, hidden) if len(names) > 1 else (hidden, self.channels)
        found: dict[str, SeparateTensor] = {}
        for expert in range(self.own.full):
            is_ours = self.first <= expert < self.first + self.own.size
            weight = weights[expert - self.first] if is_ours else weights[0, :0]
            for name, part in zip(names, weight.chunk(len(names)), strict=True):
                found[f"{expert}.{name}.weight"] = SeparateTensor(part, splits)
        return found
