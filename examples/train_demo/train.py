"""Train the bundled demo checkpoint: a small LlamaCanon that answers the questions of `lamella.demo.questions`.

The questions are made on the fly; held-out ones are never trained on, and they alone measure accuracy.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from lamella.checkpoint.names import targets
from lamella.demo import CHECKPOINT
from lamella.demo.questions import (
    END,
    MAX_TOKENS,
    START,
    TASKS,
    UNKNOWN,
    VOCABULARY,
    Question,
    held_out,
    is_held_out,
    make_question,
)
from lamella.layers.context import forward_batch
from lamella.layers.decoder import plain_batch
from lamella.layers.local_kit import LocalKit
from lamella.models import LlamaCanonForCausalLM

IDS = {word: index for index, word in enumerate(VOCABULARY)}
CONFIG: dict[str, Any] = {
    "architectures": ["LlamaCanonForCausalLM"],
    "model_type": "LlamaCanon",
    "vocab_size": len(VOCABULARY),
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "rope_dim": 8,
    "canon_set": "ABCD",
    "canon_kernel": 4,
    "qk_norm": True,
    "tie_word_embeddings": True,
    "bos_token_id": IDS[START],
    "eos_token_id": IDS[END],
    "torch_dtype": "float32",
}
# The tasks of a batch's rows, in turn: the one that takes longest twice.
MIX = ("copy", "hop", "calc", "calc")
IGNORED = -100


def encode(questions: Sequence[Question], length: int) -> tuple[Tensor, Tensor]:
    """Token ids and labels, both (rows, length): one question a row from position 0, the label of a token the next one.

    Only answers and their ends are labels; rows are filled up on the right, where causal layers never look back from.
    """
    ids = torch.full((len(questions), length), IDS[END])
    labels = torch.full((len(questions), length), IGNORED)
    for row, question in enumerate(questions):
        prompt = [IDS[word] for word in (START, *question.prompt.split())]
        answer = [IDS[word] for word in (*question.answer.split(), END)]
        ids[row, : len(prompt) + len(answer)] = torch.tensor(prompt + answer)
        labels[row, len(prompt) - 1 : len(prompt) - 1 + len(answer)] = torch.tensor(answer)
    return ids, labels


class TrainingBatches(IterableDataset[tuple[Tensor, Tensor]]):
    """Endless batches of questions that are not held out; each worker process has random numbers of its own."""

    def __init__(self, rows: int, seed: int) -> None:
        self.rows, self.seed = rows, seed

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        worker = get_worker_info()
        rng = random.Random(f"{self.seed} {worker.id if worker else 0}")
        while True:
            yield encode([self.question(MIX[row % len(MIX)], rng) for row in range(self.rows)], MAX_TOKENS)

    @staticmethod
    def question(task: str, rng: random.Random) -> Question:
        """A question to train on."""
        while is_held_out(question := make_question(task, rng)):
            pass
        return question


@torch.no_grad()
def accuracy(model: LlamaCanonForCausalLM, questions: Sequence[Question], rows: int = 256) -> float:
    """The share of questions that greedy decoding answers exactly, end included.

    It does so just when each token of the answer is the likeliest after the right ones before it, so that one forward
    over question and answer tells.
    """
    device, right = next(model.parameters()).device, 0
    for start in range(0, len(questions), rows):
        ids, labels = (side.to(device) for side in encode(questions[start : start + rows], MAX_TOKENS))
        said = model.compute_logits(model(ids)).argmax(-1)
        right += int(((said == labels) | (labels == IGNORED)).all(-1).sum())
    return right / len(questions)


def make_exam(count: int, seed: int) -> dict[str, list[Question]]:
    """`count` held-out questions of each task."""
    return {task: held_out(count, seed, task) for task in TASKS}


def examine(model: LlamaCanonForCausalLM, exam: Mapping[str, Sequence[Question]]) -> dict[str, float]:
    """The accuracy in each task."""
    with torch.compiler.set_stance("force_eager"):
        return {task: accuracy(model, questions) for task, questions in exam.items()}


def in_words(found: Mapping[str, float]) -> str:
    return "  ".join(f"{task} {share:7.2%}" for task, share in found.items())


def save(model: LlamaCanonForCausalLM, folder: Path) -> None:
    """Write model, configs and tokenizer in the Hugging Face layout."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {
        name: target.parameter.detach()[target.start : target.stop].float().cpu().clone()
        for name, target in targets(model, type(model).checkpoint_names).items()
    }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "model.safetensors").chmod(0o644)
    tokens = {"bos_token": START, "eos_token": END, "unk_token": UNKNOWN}
    generation = {"bos_token_id": IDS[START], "eos_token_id": IDS[END], "do_sample": False}
    for name, values in {
        "config.json": CONFIG,
        "generation_config.json": generation,
        "tokenizer_config.json": {"tokenizer_class": "PreTrainedTokenizerFast", **tokens},
    }.items():
        (folder / name).write_text(json.dumps(values, indent=2) + "\n")
    tokenizer().save(str(folder / "tokenizer.json"))


def tokenizer() -> Tokenizer:
    """A token for each word; the start token stands in front of every text."""
    made = Tokenizer(WordLevel(IDS, unk_token=UNKNOWN))
    made.add_special_tokens([UNKNOWN, START, END])
    made.pre_tokenizer = WhitespaceSplit()
    made.post_processor = TemplateProcessing(
        single=f"{START} $A", pair=f"{START} $A $B", special_tokens=[(START, IDS[START])]
    )
    return made


def rate(progress: float, peak: float) -> float:
    """The learning rate: a short warm-up, then half a cosine down to nothing. `progress` runs from 0 to 1."""
    return peak * min(progress / 0.02, 0.5 + 0.5 * math.cos(math.pi * min(progress, 1.0)))


def train(args: argparse.Namespace) -> None:
    """Train until the steps or the minutes are over; keep the weights whose weakest task did best, the last such."""
    torch.manual_seed(args.seed)
    torch.set_float32_matmul_precision("high")
    model = LlamaCanonForCausalLM.from_config(CONFIG, LocalKit(torch.float32, args.device))
    matrices = [p for p in model.parameters() if p.dim() == 2]
    others = [p for p in model.parameters() if p.dim() != 2]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.05}, {"params": others, "weight_decay": 0.0}],
        betas=(0.9, 0.98),
        fused=True,
    )
    data = TrainingBatches(args.rows, args.seed)
    batches = iter(DataLoader(data, batch_size=None, num_workers=args.workers, pin_memory=args.device != "cpu"))
    ids = next(batches)[0].to(args.device)
    shared = plain_batch(ids)
    with torch.no_grad(), forward_batch(shared):
        model(ids.flatten())  # leaves in `shared` what all layers need and compiled ones only read
    if args.compile:
        for layer in model.model.layers:
            layer.compile()
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters", flush=True)

    exam, best, best_step = make_exam(args.questions, seed=0), 0.0, 0
    began, step, progress, loss_sum = time.perf_counter(), 0, 0.0, torch.zeros((), device=args.device)
    while progress < 1:
        for group in optimizer.param_groups:
            group["lr"] = rate(progress, args.lr)
        ids, labels = (side.to(args.device, non_blocking=True) for side in next(batches))
        with forward_batch(shared):
            hidden = model(ids.flatten())
        loss = cross_entropy(model.compute_logits(hidden), labels.flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        loss_sum += loss.detach()
        step += 1
        minutes = (time.perf_counter() - began) / 60
        progress = max(step / args.steps if args.steps else 0.0, minutes / args.minutes if args.minutes else 0.0)
        if step % args.report == 0 or progress >= 1:
            found, loss_mean = examine(model, exam), loss_sum.item() / ((step - 1) % args.report + 1)
            print(f"{minutes:5.2f} min  step {step}  loss {loss_mean:.4f}  {in_words(found)}", flush=True)
            loss_sum.zero_()
            if min(found.values()) >= best:
                best, best_step = min(found.values()), step
                save(model, args.out)
    print(f"kept step {best_step}")


def check(folder: Path, questions: int) -> None:
    """Load what is saved as anyone would, and count in float32 on the CPU."""
    torch.set_float32_matmul_precision("highest")
    model = LlamaCanonForCausalLM.from_pretrained(folder, dtype=torch.float32)
    size = sum(file.stat().st_size for file in folder.iterdir())
    found = examine(model, make_exam(questions, seed=1))
    print(f"{folder}: {size:,} bytes, {questions} held-out questions a task: {in_words(found)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--minutes", type=float, default=0.0, help="stop after so long (0: no limit)")
    parser.add_argument("--steps", type=int, default=0, help="stop after so many steps (0: no limit)")
    parser.add_argument("--rows", type=int, default=256, help="questions in a batch")
    parser.add_argument("--lr", type=float, default=2e-3, help="highest learning rate")
    parser.add_argument("--seed", type=int, default=0, help="of the weights and the questions")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--compile", action="store_true", help="compile the layers with torch.compile")
    parser.add_argument("--workers", type=int, default=8, help="processes that make questions")
    parser.add_argument("--report", type=int, default=500, help="steps between measurements")
    parser.add_argument("--questions", type=int, default=500, help="held-out questions of each task in a measurement")
    parser.add_argument("--out", type=Path, default=CHECKPOINT, help="folder of the checkpoint")
    parser.add_argument("--check-only", action="store_true", help="train nothing, measure the checkpoint in --out")
    args = parser.parse_args()
    if not args.check_only:
        if not (args.steps or args.minutes):
            parser.error("give --steps or --minutes")
        train(args)
    check(args.out, args.questions)


if __name__ == "__main__":
    main()
