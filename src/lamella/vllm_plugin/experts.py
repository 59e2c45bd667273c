"""Routed experts by vLLM's fused layer, for what it can do and ours cannot: quantised ones, and a rank's whole ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from vllm.platforms import current_platform

from lamella.config import MoEConfig
from lamella.errors import CheckpointError
from lamella.ops.moe.reference import route
from lamella.vllm_plugin import compat

if TYPE_CHECKING:
    from vllm.model_executor.layers.quantization import QuantizationConfig

# The projections that are one parameter in vLLM, in the order in which files have them side by side.
_PROJECTIONS = {"w13_": {"gate_proj": "w1", "up_proj": "w3"}, "w2_": {"down_proj": "w2"}}
_SIDE_BY_SIDE = {"w13_": "gate_up_proj", "w2_": "down_proj"}


@dataclass(frozen=True)
class ExpertTensor:
    """A tensor that files may hold: its name, the parameter that it goes to, and how.

    `stands_for` are the names of the tensors of single experts that are in it.
    """

    name: str
    parameter: str
    fill: Callable[[Tensor], None]
    stands_for: tuple[str, ...]


class VllmExperts(nn.Module):
    """The routed experts as vLLM computes them; what `Experts` is called with, and what it gives.

    vLLM is given a row for each pair of a token and an expert of it, which has been weighted, and goes to that expert
    with weight one. Its own weighting of inputs is for one expert a token, in the model's dtype, and not in all of its
    kernels.
    """

    def __init__(
        self, config: MoEConfig, hidden_size: int, quant_config: QuantizationConfig | None, prefix: str
    ) -> None:
        super().__init__()
        self.top_k, self.num_experts = config.top_k, config.num_experts
        self.layer = compat.fused_moe()(
            num_experts=config.num_experts,
            top_k=1,
            hidden_size=hidden_size,
            intermediate_size=config.intermediate_size,
            custom_routing_function=_settled,
            renormalize=False,
            reduce_results=False,  # over the ranks once, together with the shared expert
            quant_config=quant_config,
            prefix=prefix,
        )
        # vLLM's kernels for CPUs take no notice of which experts a rank has.
        self.local_ids: Tensor | None = self.layer.expert_map if current_platform.is_cpu() else None

    def forward(self, x: Tensor, logits: Tensor, base: Tensor | None = None) -> Tensor:
        """What the rank's experts make of x (T, hidden) by the router's logits (T, E), added to base (T, hidden)."""
        ids, weights = route(logits, self.top_k)
        if self.local_ids is not None:  # of others' rows zeros enter an expert here, and leave it
            ids = self.local_ids[ids]
            weights, ids = weights * (ids >= 0), ids.clamp(min=0)
        rows = (x[:, None].float() * weights[..., None]).to(x.dtype).flatten(0, 1)
        out = self.layer(rows, ids.flatten()[:, None])
        if self.top_k > 1:
            out = out.unflatten(0, (x.shape[0], self.top_k)).float().sum(1).to(x.dtype)
        return out if base is None else base + out

    def tensors(self) -> Iterator[ExpertTensor]:
        """All that files may hold: of each expert by itself, `7.gate_proj.weight` (I, hidden), or of all in one,
        `gate_up_proj` (E, hidden, 2 I), with what belongs to a quantised one.
        """
        parameters: dict[str, Any] = dict(self.named_parameters())
        for path, parameter in parameters.items():
            leaf = path.rpartition(".")[2]
            kind = next(kind for kind in _PROJECTIONS if leaf.startswith(kind))
            suffix = leaf.removeprefix(kind)
            load = partial(parameter.weight_loader, parameter, weight_name=path)
            names = []
            for name, shard in _PROJECTIONS[kind].items():
                for expert in range(self.num_experts):
                    names.append(f"{expert}.{name}.{suffix}")
                    fill = partial(load, shard_id=shard, expert_id=expert)
                    yield ExpertTensor(names[-1], path, fill, (names[-1],))
            whole = _SIDE_BY_SIDE[kind] + ("" if suffix == "weight" else f"_{suffix}")
            shards = list(_PROJECTIONS[kind].values())
            yield ExpertTensor(whole, path, partial(self._fill_all, load, whole, shards), tuple(names))

    def _fill_all(self, load: Callable[..., Any], name: str, shards: Sequence[str], tensor: Tensor) -> None:
        """A tensor (E, inputs, outputs) of all experts, or a number that holds for all of them."""
        if tensor.numel() == 1:
            for shard in shards:
                for expert in range(self.num_experts):
                    load(tensor.reshape(()), shard_id=shard, expert_id=expert)
            return
        if tensor.dim() != 3 or tensor.shape[0] != self.num_experts:
            raise CheckpointError(
                f"tensor {name} has shape {tuple(tensor.shape)}; of {self.num_experts} experts in one there must be "
                f"({self.num_experts}, inputs, outputs), or a single number"
            )
        for shard, part in zip(shards, tensor.transpose(1, 2).chunk(len(shards), 1), strict=True):
            for expert, weight in enumerate(part):
                load(weight, shard_id=shard, expert_id=expert)


def _settled(hidden_states: Tensor, gating_output: Tensor, topk: int, renormalize: bool) -> tuple[Tensor, Tensor]:
    """The routing in vLLM's form, of rows whose expert is settled: in place of logits they come with its number."""
    assert topk == 1 and not renormalize
    ids = gating_output.int()
    return torch.ones_like(ids, dtype=torch.float32), ids
