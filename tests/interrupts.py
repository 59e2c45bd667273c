"""Exceptions at a chosen line of the engine's code, and tiny models of every kind to raise them in."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import apriel2_models
import image_models
import lamella
from helpers import canon_checkpoint, hf_checkpoint, randomize

PACKAGE = str(Path(lamella.__file__).parent)
PARTS = tuple(f"{PACKAGE}/{name}/" for name in ("engine", "state", "layers"))


class Lines:
    """Counts the lines of the engine, its state and layers that run; raises at the chosen one."""

    def __init__(self, chosen: int, error: BaseException) -> None:
        self.count, self.chosen, self.error = 0, chosen, error
        self.where = ""

    def trace(self, frame: FrameType, event: str, _: Any) -> Callable[..., Any] | None:
        """The global trace function, see `sys.settrace`."""
        return self.line if frame.f_code.co_filename.startswith(PARTS) else None

    def line(self, frame: FrameType, event: str, _: Any) -> Callable[..., Any]:
        if event == "line":
            self.count += 1
            if self.count == self.chosen:
                self.where = f"{frame.f_code.co_filename[len(PACKAGE) + 1 :]}:{frame.f_lineno}"
                raise self.error
        return self.line


@contextmanager
def interrupted(chosen: int, error: BaseException) -> Iterator[Lines]:
    """Raise `error` before the `chosen` line of the engine's code that the block runs (from 1; 0 only counts)."""
    lines, before = Lines(chosen, error), sys.gettrace()
    sys.settrace(lines.trace)
    try:
        yield lines
    finally:
        sys.settrace(before)


def checkpoint(kind: str, folder: Path) -> Path:
    """A random tiny model of a kind on disk."""
    if kind == "canon":
        return canon_checkpoint(folder)
    if kind == "hybrid":
        names = ["attention", "gdn", "mamba", "sliding_window", "kda"]
        return apriel2_models.checkpoint(folder, apriel2_models.pattern(names))
    if kind in ("supernet", "mixed"):
        return apriel2_models.checkpoint(folder, apriel2_models.fixed(apriel2_models.SUPERNET, 3))
    size = dict(vocab_size=128, hidden_size=32, intermediate_size=48, num_attention_heads=4, num_key_value_heads=2)
    if kind == "llama":
        from transformers import LlamaConfig

        hf_checkpoint(folder, LlamaConfig(**size, num_hidden_layers=2, max_position_embeddings=256))
    elif kind == "sliding":
        from transformers import Qwen3Config

        window = dict(use_sliding_window=True, sliding_window=7, layer_types=["full_attention", "sliding_attention"])
        hf_checkpoint(folder, Qwen3Config(**size, **window, num_hidden_layers=2, head_dim=16))
    else:
        from transformers import Llama4ForCausalLM, Llama4TextConfig

        config = Llama4TextConfig(**image_models.TEXT)
        config._attn_implementation = "eager"
        model = Llama4ForCausalLM(config).eval()
        randomize(model, 0)
        model.save_pretrained(folder)
    return folder


KINDS = ("llama", "sliding", "canon", "hybrid", "supernet", "mixed", "llama4")
