"""Llama 4's sight: from the tiles of images to rows that stand in place of patch tokens in the language model's input.

Math and names: transformers' `models/llama4`. Every tile is by itself, and sees all of itself. The modules are named as
in the files, whose tensors they are filled with one to one.
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
    """Sizes of the tower, in elements; `image_size` is a tile's side and `patch_size` a patch's, in pixels.

    After the tower `shuffle` patches each way become one row, which the adapter brings from `adapter_in` to
    `adapter_out` and the projector to `output_size`, the language model's width.
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
        """Rows that a tile becomes, and so patch tokens that stand for it."""
        return (self.side // self.shuffle) ** 2

    @classmethod
    def read(cls, config: HFConfig) -> VisionConfig:
        """From a `Llama4ForConditionalGeneration` config file. Raises `ConfigError` naming the key."""
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
    """All of a tile to all of it."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        size = config.hidden_size
        self.heads, self.head_dim = config.num_heads, size // config.num_heads
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(size, size) for _ in range(4))

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """x (N, n, C), angles of the n patches (n, D / 2) fp32."""
        tiles, count, _ = x.shape
        shape = tiles * count, self.heads, self.head_dim
        q, k, v = (part(x).view(shape) for part in (self.q_proj, self.k_proj, self.v_proj))
        q, k = rotate(q, k, Rope(cos.repeat(tiles, 1), sin.repeat(tiles, 1), interleaved=True))
        q, k, v = (part.unflatten(0, (tiles, count)).transpose(1, 2) for part in (q, k, v))
        return self.o_proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """Two projections with a GELU between, and after the second as well where it is `last`."""

    def __init__(self, sizes: tuple[int, int, int], bias: bool, last: bool = False) -> None:
        super().__init__()
        self.fc1, self.fc2, self.last = nn.Linear(*sizes[:2], bias=bias), nn.Linear(*sizes[1:], bias=bias), last

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc2(F.gelu(self.fc1(x)))
        return F.gelu(x) if self.last else x


class LayerNorm(nn.LayerNorm):
    """torch's, whose weight starts from one."""

    layouts: ClassVar = {"weight": ParameterLayout(initial=(1.0, 1.0))}


class Layer(nn.Module):
    """A pre-norm block."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        size = config.hidden_size
        self.self_attn = Attention(config)
        self.mlp = MLP((size, config.intermediate_size, size), bias=True)
        self.input_layernorm, self.post_attention_layernorm = LayerNorm(size), LayerNorm(size)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin)
        return x + self.mlp(self.post_attention_layernorm(x))


class Tower(nn.Module):
    """Patches, blocks, and the adapter: tiles (N, channels, S, S) to (N, rows, adapter_out)."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.config = config
        size, patch = config.hidden_size, config.patch_size
        self.patch_embedding = nn.ModuleDict({"linear": nn.Linear(config.channels * patch**2, size, bias=False)})
        self.class_embedding = nn.Parameter(torch.zeros(size))
        self.positional_embedding_vlm = nn.Parameter(torch.zeros(config.side**2 + 1, size))
        self.layernorm_pre, self.layernorm_post = LayerNorm(size), LayerNorm(size)
        self.model = nn.ModuleDict({"layers": nn.ModuleList(Layer(config) for _ in range(config.num_layers))})
        adapter = MLP((size * config.shuffle**2, config.adapter_in, config.adapter_out), bias=False, last=True)
        self.vision_adapter = nn.ModuleDict({"mlp": adapter})

    def forward(self, tiles: Tensor) -> Tensor:
        patch = self.config.patch_size
        patches = F.unfold(tiles, patch, stride=patch).transpose(1, 2)
        x = self.patch_embedding["linear"](patches)
        # The class token stands last, unturned, and is dropped in the end.
        x = torch.cat((x, self.class_embedding.expand(x.shape[0], 1, -1)), 1) + self.positional_embedding_vlm
        x, angles = self.layernorm_pre(x), patch_angles(self.config).to(x.device)
        for layer in self.model["layers"].children():
            x = layer(x, angles.cos(), angles.sin())
        return self.vision_adapter["mlp"](self._joined(self.layernorm_post(x)[:, :-1]))

    def _joined(self, x: Tensor) -> Tensor:
        """Squares of patches (N, side^2, C) as one row each, line by line: (N, rows, shuffle^2 C)."""
        side, step = self.config.side, self.config.shuffle
        squares = x.unflatten(1, (side // step, step, side // step, step)).permute(0, 1, 3, 2, 4, 5)
        return squares.flatten(1, 2).flatten(2)


class Vision(nn.Module):
    """The tower and the projector to the language model's width."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.config = config
        self.vision_model = Tower(config)
        projector = nn.Linear(config.adapter_out, config.output_size, bias=False)
        self.multi_modal_projector = nn.ModuleDict({"linear_1": projector})

    def forward(self, tiles: Tensor) -> Tensor:
        """Tiles (N, channels, S, S) -> (N, rows_per_tile, output_size)."""
        return self.multi_modal_projector["linear_1"](self.vision_model(tiles))

    @classmethod
    def from_pretrained(
        cls, path: str | Path, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
    ) -> Vision:
        """The vision part of the checkpoint in a folder; of its tensors only these are read.

        Raises `CheckpointError` where one is missing, left over or of the wrong shape.
        """
        file = Path(path) / "config.json"
        vision = cls.allocate(VisionConfig.read(HFConfig(read_json(file), str(file))), dtype, device)
        vision.fill(Path(path))
        return vision

    @classmethod
    def allocate(cls, config: VisionConfig, dtype: torch.dtype, device: torch.device | str) -> Vision:
        """One whose parameters are not initialised."""
        with torch.device("meta"):
            vision = cls(config)
        return vision.to(dtype).to_empty(device=device).eval().requires_grad_(False)

    def fill(self, folder: Path) -> None:
        """Read the parameters. Raises `CheckpointError` where a tensor is missing, left over, quantised or of the wrong
        shape.
        """
        wanted = self.state_dict()
        with vision_tensors(folder).opened() as tensors:
            names = set(tensors.names())
            for kind, some in (("missing", set(wanted) - names), ("unexpected", names - set(wanted))):
                if some:
                    raise CheckpointError(f"{folder}: vision tensors {kind}: {', '.join(sorted(some)[:20])}")
            for name, place in wanted.items():
                if tensors.shape(name) != tuple(place.shape):
                    shapes = f"has shape {tensors.shape(name)}, the config says {tuple(place.shape)}"
                    raise CheckpointError(f"{folder}: tensor {name} {shapes}")
                tensor = tensors.load(name)
                check_dtype(folder, name, tensor)
                place.copy_(tensor)


def vision_tensors(folder: Path) -> SafetensorsFolder:
    """The vision part's tensors in a checkpoint's folder."""
    return SafetensorsFolder(folder, lambda name: name if name.startswith(PARTS) else None, None)


def patch_angles(config: VisionConfig) -> Tensor:
    """The angle of each pair of channels, (patches + 1, head_dim / 2) fp32: by column, then by row; the class token's
    are zero.
    """
    pairs = config.hidden_size // config.num_heads // 4
    frequencies = 1.0 / config.theta ** (torch.arange(pairs).float() / pairs)
    place = torch.arange(config.side**2)
    across, down = ((part + 1)[:, None] * frequencies for part in (place % config.side, place // config.side))
    return torch.cat((torch.cat((across, down), -1), torch.zeros(1, 2 * pairs)))
