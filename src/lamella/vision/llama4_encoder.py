"""Llama 4's vision encoder: from image tiles to the embeddings of patch tokens in the language model's input.

Math and names: transformers' `models/llama4`. Tiles are encoded independently, with full attention within a tile. The
modules have the names of the file's tensors, which they are filled from one to one.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lamella.checkpoint.file_kinds import read_json
from lamella.checkpoint.loader import check_dtype
from lamella.checkpoint.tensors import SafetensorsFolder
from lamella.config.checks import check
from lamella.config.hf_config import HFConfig
from lamella.errors import CheckpointError
from lamella.layers.parameters import ParameterLayout
from lamella.ops.operands import Rope
from lamella.ops.rotary import rotate

PARTS = ("vision_model.", "multi_modal_projector.")


@dataclass(frozen=True, kw_only=True)
class VisionConfig:
    """Sizes of the vision encoder.

    Attributes:
        hidden_size: width of the encoder, in channels.
        num_layers: number of layers.
        num_heads: number of attention heads.
        intermediate_size: width of the feed-forward, in channels.
        image_size: side of a tile, in pixels.
        patch_size: side of a patch, in pixels.
        adapter_in: intermediate width of the adapter.
        adapter_out: output width of the adapter.
        output_size: width of the language model.
        shuffle: the pixel shuffle joins `shuffle` x `shuffle` patches into one row.
        channels: channels of an image.
        theta: base of the RoPE frequencies.
    """

    hidden_size: int
    num_layers: int
    num_heads: int
    intermediate_size: int
    image_size: int
    patch_size: int
    adapter_in: int
    adapter_out: int
    output_size: int
    shuffle: int = 2
    channels: int = 3
    theta: float = 10000.0

    def __post_init__(self) -> None:
        heads = self.num_heads
        check(self.hidden_size % (4 * heads) == 0, "vision.hidden_size", self.hidden_size, f"a multiple of 4 x {heads}")
        check(self.image_size % self.patch_size == 0, "vision.image_size", self.image_size, "whole patches")
        check(self.side % self.shuffle == 0, "vision.image_size", self.image_size, "patches that can be joined")

    @property
    def side(self) -> int:
        """Patches along a tile's side."""
        return self.image_size // self.patch_size

    @property
    def rows_per_tile(self) -> int:
        """Number of embeddings, and of patch tokens, per tile."""
        return (self.side // self.shuffle) ** 2

    @classmethod
    def read(cls, config: HFConfig) -> VisionConfig:
        """Read the sizes from a `Llama4ForConditionalGeneration` config file.

        Raises:
            ConfigError: a value is wrong or not supported; the message names the key.
        """
        text = HFConfig(config.mapping("text_config"), config.source)
        vision = config.section("vision_config", config.mapping("vision_config"))
        vision.choice("hidden_act", ("gelu",), "gelu")
        vision.choice("multi_modal_projector_bias", (False,), False)
        vision.choice("vision_feature_select_strategy", ("default",), "default")
        vision.choice("vision_feature_layer", (-1,), -1)
        vision.choice("norm_eps", (1e-5,), 1e-5)
        ratio, output = vision.float("pixel_shuffle_ratio", 0.5), vision.int("projector_output_dim", 4096)
        if ratio <= 0 or (1 / ratio) % 1 != 0:
            raise vision.error("pixel_shuffle_ratio", ratio, "one over a whole number")
        if vision.int("vision_output_dim", output) != output:
            raise vision.error("vision_output_dim", vision.int("vision_output_dim"), f"projector_output_dim={output}")
        rope = HFConfig(vision.mapping("rope_parameters"), f"{vision.source}: rope_parameters")
        rope.choice("rope_type", ("default",), "default")
        theta = rope.float("rope_theta", vision.float("rope_theta", 10000.0))
        rope.finish()
        read = cls(
            hidden_size=vision.int("hidden_size"),
            num_layers=vision.int("num_hidden_layers"),
            num_heads=vision.int("num_attention_heads"),
            intermediate_size=vision.int("intermediate_size"),
            image_size=vision.int("image_size"),
            patch_size=vision.int("patch_size"),
            adapter_in=vision.int("projector_input_dim", 4096),
            adapter_out=output,
            output_size=text.int("hidden_size", 5120),
            shuffle=round(1 / ratio),
            channels=vision.int("num_channels", 3),
            theta=theta,
        )
        vision.finish(harmless=("projector_dropout",))
        return read


class Attention(nn.Module):
    """Full self-attention within each tile."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        size = config.hidden_size
        self.heads, self.head_dim = config.num_heads, size // config.num_heads
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(size, size) for _ in range(4))

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Return the attention output (N, n, C) for x (N, n, C), with cos and sin of the n patches (n, D / 2) fp32."""
        tiles, count, _ = x.shape
        shape = tiles * count, self.heads, self.head_dim
        q, k, v = (part(x).view(shape) for part in (self.q_proj, self.k_proj, self.v_proj))
        q, k = rotate(q, k, Rope(cos.repeat(tiles, 1), sin.repeat(tiles, 1), interleaved=True))
        q, k, v = (part.unflatten(0, (tiles, count)).transpose(1, 2) for part in (q, k, v))
        return self.o_proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """Two projections with GELU between them, and also after the second if `activate_output`."""

    def __init__(self, sizes: tuple[int, int, int], bias: bool, activate_output: bool = False) -> None:
        super().__init__()
        self.fc1, self.fc2, self.activate_output = (
            nn.Linear(*sizes[:2], bias=bias),
            nn.Linear(*sizes[1:], bias=bias),
            activate_output,
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return the output (..., sizes[2]) for x (..., sizes[0])."""
        x = self.fc2(F.gelu(self.fc1(x)))
        return F.gelu(x) if self.activate_output else x


class LayerNorm(nn.LayerNorm):
    """torch's layer norm, with an initial weight of one for dummy weights."""

    layouts: ClassVar = {"weight": ParameterLayout(initial=(1.0, 1.0))}


class Layer(nn.Module):
    """Pre-norm transformer layer."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        size = config.hidden_size
        self.self_attn = Attention(config)
        self.mlp = MLP((size, config.intermediate_size, size), bias=True)
        self.input_layernorm, self.post_attention_layernorm = LayerNorm(size), LayerNorm(size)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Return the output (N, n, C) for x (N, n, C)."""
        x = x + self.self_attn(self.input_layernorm(x), cos, sin)
        return x + self.mlp(self.post_attention_layernorm(x))


class VisionEncoder(nn.Module):
    """Patch embedding, transformer layers, pixel shuffle and adapter."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.config = config
        size, patch = config.hidden_size, config.patch_size
        self.patch_embedding = nn.ModuleDict({"linear": nn.Linear(config.channels * patch**2, size, bias=False)})
        self.class_embedding = nn.Parameter(torch.zeros(size))
        self.positional_embedding_vlm = nn.Parameter(torch.zeros(config.side**2 + 1, size))
        self.layernorm_pre, self.layernorm_post = LayerNorm(size), LayerNorm(size)
        self.model = nn.ModuleDict({"layers": nn.ModuleList(Layer(config) for _ in range(config.num_layers))})
        adapter = MLP(
            (size * config.shuffle**2, config.adapter_in, config.adapter_out), bias=False, activate_output=True
        )
        self.vision_adapter = nn.ModuleDict({"mlp": adapter})

    def forward(self, tiles: Tensor) -> Tensor:
        """Return (N, rows_per_tile, adapter_out) for tiles (N, channels, S, S)."""
        patch = self.config.patch_size
        patches = F.unfold(tiles, patch, stride=patch).transpose(1, 2)
        x = self.patch_embedding["linear"](patches)
        # The class token is last, is not rotated, and is dropped at the end.
        x = torch.cat((x, self.class_embedding.expand(x.shape[0], 1, -1)), 1) + self.positional_embedding_vlm
        x, angles = self.layernorm_pre(x), patch_angles(self.config).to(x.device)
        for layer in self.model["layers"].children():
            x = layer(x, angles.cos(), angles.sin())
        return self.vision_adapter["mlp"](self._pixel_shuffle(self.layernorm_post(x)[:, :-1]))

    def _pixel_shuffle(self, x: Tensor) -> Tensor:
        """Join squares of patches (N, side^2, C) into rows, line by line: (N, rows_per_tile, shuffle^2 * C)."""
        side, step = self.config.side, self.config.shuffle
        squares = x.unflatten(1, (side // step, step, side // step, step)).permute(0, 1, 3, 2, 4, 5)
        return squares.flatten(1, 2).flatten(2)


class Vision(nn.Module):
    """Vision encoder and projector to the language model's width."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.config = config
        self.vision_model = VisionEncoder(config)
        projector = nn.Linear(config.adapter_out, config.output_size, bias=False)
        self.multi_modal_projector = nn.ModuleDict({"linear_1": projector})

    def forward(self, tiles: Tensor) -> Tensor:
        """Return the embeddings (N, rows_per_tile, output_size) of tiles (N, channels, S, S)."""
        return self.multi_modal_projector["linear_1"](self.vision_model(tiles))

    @classmethod
    def from_pretrained(
        cls, path: str | Path, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
    ) -> Vision:
        """Load the vision part of a checkpoint.

        Args:
            path: folder of the checkpoint; only the vision tensors are read.
            dtype: dtype of the weights.
            device: device of the weights.

        Raises:
            ConfigError: a value of the config is wrong or not supported.
            CheckpointError: a tensor is missing, unexpected or has the wrong shape.
        """
        file = Path(path) / "config.json"
        vision = cls.allocate(VisionConfig.read(HFConfig(read_json(file), str(file))), dtype, device)
        vision.fill(Path(path))
        return vision

    @classmethod
    def allocate(cls, config: VisionConfig, dtype: torch.dtype, device: torch.device | str) -> Vision:
        """Return a module with uninitialized parameters."""
        with torch.device("meta"):
            vision = cls(config)
        return vision.to(dtype).to_empty(device=device).eval().requires_grad_(False)

    def fill(self, folder: Path) -> None:
        """Read the parameters from a folder.

        Raises:
            CheckpointError: a tensor is missing, unexpected, quantised, or has the wrong shape.
        """
        wanted = self.state_dict()
        with vision_tensors(folder).opened() as tensors:
            names = set(tensors.names())
            for kind, some in (("missing", set(wanted) - names), ("unexpected", names - set(wanted))):
                if some:
                    raise CheckpointError(f"{folder}: vision tensors {kind}: {', '.join(sorted(some)[:20])}")
            for name, target in wanted.items():
                if tensors.shape(name) != tuple(target.shape):
                    shapes = f"has shape {tensors.shape(name)}, the config says {tuple(target.shape)}"
                    raise CheckpointError(f"{folder}: tensor {name} {shapes}")
                tensor = tensors.load(name)
                check_dtype(folder, name, tensor)
                target.copy_(tensor)


def vision_tensors(folder: Path) -> SafetensorsFolder:
    """Return the vision tensors of the checkpoint in a folder."""
    return SafetensorsFolder(folder, lambda name: name if name.startswith(PARTS) else None, None)


def patch_angles(config: VisionConfig) -> Tensor:
    """Return the RoPE angles of each patch and of the class token.

    Returns:
        (patches + 1, head_dim / 2) fp32: the first half by column, the second half by row; zeros for the class token.
    """
    pairs = config.hidden_size // config.num_heads // 4
    frequencies = 1.0 / config.theta ** (torch.arange(pairs).float() / pairs)
    target = torch.arange(config.side**2)
    across, down = ((part + 1)[:, None] * frequencies for part in (target % config.side, target // config.side))
    return torch.cat((torch.cat((across, down), -1), torch.zeros(1, 2 * pairs)))
