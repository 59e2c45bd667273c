"""Routed experts by vLLM's fused layer, for quantised experts and expert parallelism."""

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

# vLLM's parameters with the projections that they hold, in the order in which files concatenate them.
_PROJECTIONS = {"w13_": {"gate_proj": "w1", "up_proj": "w3"}, "w2_": {"down_proj": "w2"}}
_MERGED_NAMES = {"w13_": "gate_up_proj", "w2_": "down_proj"}


@dataclass(frozen=True)
class ExpertTensor:
    """Tensor that a file may contain.

    Attributes:
        name: name in the file.
        parameter: path of the parameter that it fills.
        fill: copies the tensor into the parameter.
        stands_for: names of the per-expert tensors that it contains.
    """

    name: str
    parameter: str
    fill: Callable[[Tensor], None]
    stands_for: tuple[str, ...]


class VllmExperts(nn.Module):
    """Routed experts computed by vLLM, with the interface of `Experts`.

    vLLM gets one row per pair of token and chosen expert. The row is already multiplied by the expert's weight and is
    routed to that expert with weight one. vLLM's own weighting of inputs supports one expert per token only, computes
    in the model's dtype, and is missing in some of its kernels.
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
            custom_routing_function=_fixed_routing,
            renormalize=False,
            reduce_results=False,  # summed over the ranks once, together with the shared expert
            quant_config=quant_config,
            prefix=prefix,
        )
        # vLLM's CPU kernels ignore the expert map of the rank.
        self.local_ids: Tensor | None = self.layer.expert_map if current_platform.is_cpu() else None

    def forward(self, x: Tensor, logits: Tensor, base: Tensor | None = None) -> Tensor:
        """Return the weighted sum of this rank's experts; see `Experts.forward`."""
        ids, weights = route(logits, self.top_k)
        if self.local_ids is not None:  # rows of other ranks' experts become zeros
            ids = self.local_ids[ids]
            weights, ids = weights * (ids >= 0), ids.clamp(min=0)
        rows = (x[:, None].float() * weights[..., None]).to(x.dtype).flatten(0, 1)
        out = self.layer(rows, ids.flatten()[:, None])
        if self.top_k > 1:
            out = out.unflatten(0, (x.shape[0], self.top_k)).float().sum(1).to(x.dtype)
        return out if base is None else base + out

    def tensors(self) -> Iterator[ExpertTensor]:
        """Yield the tensors that files may contain, with those of quantised experts.

        Files have either per-expert tensors, such as `7.gate_proj.weight` (I, hidden), or one tensor for all experts,
        such as `gate_up_proj` (E, hidden, 2 * I).
        """
        parameters: dict[str, Any] = dict(self.named_parameters())
        for path, parameter in parameters.items():
            leaf = path.rpartition(".")[2]
            group = next(group for group in _PROJECTIONS if leaf.startswith(group))
            suffix = leaf.removeprefix(group)
            load = partial(parameter.weight_loader, parameter, weight_name=path)
            names = []
            for name, shard in _PROJECTIONS[group].items():
                for expert in range(self.num_experts):
                    names.append(f"{expert}.{name}.{suffix}")
                    fill = partial(load, shard_id=shard, expert_id=expert)
                    yield ExpertTensor(names[-1], path, fill, (names[-1],))
            whole = _MERGED_NAMES[group] + ("" if suffix == "weight" else f"_{suffix}")
            shards = list(_PROJECTIONS[group].values())
            yield ExpertTensor(whole, path, partial(self._fill_all, load, whole, shards), tuple(names))

    def _fill_all(self, load: Callable[..., Any], name: str, shards: Sequence[str], tensor: Tensor) -> None:
        """Load a tensor (E, inputs, outputs) of all experts, or a single number for all of them.

        Raises:
            CheckpointError: the tensor has another shape.
        """
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


def _fixed_routing(hidden_states: Tensor, gating_output: Tensor, topk: int, renormalize: bool) -> tuple[Tensor, Tensor]:
    """Route rows whose expert is already chosen; `gating_output` (rows, 1) holds the expert id instead of logits."""
    assert topk == 1 and not renormalize
    ids = gating_output.int()
    return torch.ones_like(ids, dtype=torch.float32), ids
