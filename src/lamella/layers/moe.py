"""Feed-forward by experts, some of which each token goes to, beside one that all share."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from lamella.config import MLPConfig, MoEConfig
from lamella.layers.block_input import BlockInput
from lamella.layers.feed_forward import MLP
from lamella.layers.kit import Kit
from lamella.layers.linear import Apart, WideLinear
from lamella.ops import moe
from lamella.ops.backend import use_fused
from lamella.ops.moe.reference import route
from lamella.parallel.sharding import Split


class MoE(nn.Module):
    """`shared(x) + sum of expert_e(w_e x)`, see `MoEConfig`: the router whole on every rank, of experts a part of each.

    What the rank's parts give is summed over the ranks once, for the routed experts and the shared one together.
    """

    def __init__(self, config: MoEConfig, kit: Kit, hidden_size: int, prefix: str) -> None:
        super().__init__()
        self.group = kit.group
        whole = Split.whole(hidden_size), Split.whole(config.num_experts)
        self.router = WideLinear(*whole, False, kit.dtype, kit.device)
        self.experts = kit.experts(config, hidden_size, f"{prefix}.experts")
        self.shared_expert: MLP | None = None
        if config.shared_size is not None:
            shared = MLPConfig(intermediate_size=config.shared_size)
            self.shared_expert = MLP(shared, kit, hidden_size, f"{prefix}.shared_expert", None, reduce=False)

    def forward(self, entry: BlockInput) -> Tensor:
        """(T, hidden_size) -> (T, hidden_size)."""
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
        """Return weights (T, topk) fp32 and experts (T, topk) int32 of the router's logits (T, E), for vLLM.

        The hidden states change nothing, and the weights are not made to add up to one.
        """
        if renormalize:
            raise ValueError("renormalize=True: a weight is the sigmoid of its own logit, whatever the others are")
        ids, weights = route(gating_output, topk)
        return weights, ids.int()


class Experts(nn.Module):
    """Routed experts: gate_up_proj (E, hidden, 2 I) with gates first, down_proj (E, I, hidden).

    Of several ranks each has a shard of every expert, or some experts `whole`.

    These are the shapes of Llama 4's files. In memory inputs lie side by side, as in any projection: the parameters are
    views. Other files have every expert's projections by themselves, as those of an MLP; see `apart`.
    """

    def __init__(self, config: MoEConfig, kit: Kit, hidden_size: int, whole: bool = False) -> None:
        super().__init__()
        self.top_k = config.top_k
        if whole:
            self.own = kit.share.whole_ones(config.num_experts, "num_local_experts")
            self.channels = Split.whole(config.intermediate_size)
        else:
            self.own = Split.whole(config.num_experts)
            self.channels = kit.share.even(config.intermediate_size, "intermediate_size")
        count, inner = self.own.size, self.channels.size

        def parameter(outputs: int, inputs: int) -> nn.Parameter:
            weight = torch.empty(count, outputs, inputs, dtype=kit.dtype, device=kit.device)
            return nn.Parameter(weight.transpose(1, 2))

        self.gate_up_proj, self.down_proj = parameter(2 * inner, hidden_size), parameter(hidden_size, inner)
        hidden = Split.whole(hidden_size)
        self.splits = {
            "gate_up_proj": (self.own, hidden, Split.join((self.channels, self.channels))),
            "down_proj": (self.own, self.channels),
        }

    def forward(self, x: Tensor, logits: Tensor, base: Tensor | None = None) -> Tensor:
        """Return the experts' output of x (T, hidden) by the router's logits (T, E), added to base (T, hidden)."""
        gate_up, down = self.gate_up_proj.transpose(1, 2), self.down_proj.transpose(1, 2)
        return moe.experts(x, logits, self.top_k, gate_up, down, base, self.first)

    @property
    def first(self) -> int:
        """The first of the rank's experts."""
        return self.own.spans[0][0]

    def apart(self, leaf: str) -> Mapping[str, Apart]:
        """Return the targets of the parameter `leaf` in files that hold every expert's projections by themselves.

        Those of other ranks' experts have an empty tensor as their target.
        """
        weights = getattr(self, leaf).detach().transpose(1, 2)
        hidden, inner = Split.whole(weights.shape[2 if leaf == "gate_up_proj" else 1]), self.channels
        found: dict[str, Apart] = {}
        for expert in range(self.own.full):
            is_ours = self.first <= expert < self.first + self.own.size
            weight = weights[expert - self.first] if is_ours else weights[0, :0]
            if leaf == "gate_up_proj":
                for name, part in zip(("gate_proj", "up_proj"), weight.chunk(2), strict=True):
                    found[f"{expert}.{name}.weight"] = Apart(part, (inner, hidden))
            else:
                found[f"{expert}.down_proj.weight"] = Apart(weight, (hidden, inner))
        return found
