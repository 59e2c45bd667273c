"""Random requests on a GPU, with random delays between launches, compared with single requests on the CPU."""

from __future__ import annotations

import os
import random
import sys
import time

import pytest
import torch

import apriel2_models as apriel2
from helpers import VOCAB, canon_checkpoint, hf_checkpoint
from lamella import LLM, SamplingParams
from lamella.config import read_placement
from lamella.errors import ParameterError
from models.test_llama4 import SHAPE as LLAMA4

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
SECONDS = float(os.environ.get("LAMELLA_FUZZ_SECONDS", "40"))  # for each kind of model
OTHER_BASE = {**apriel2.ATTENTION, "rotary": {"type": "mistral_1d", "theta": 500.0}}
NO_ROTATION = {**apriel2.ATTENTION, "rotary": {"type": "none"}}
SUPERNET = {**apriel2.SUPERNET, "mixers": {**apriel2.MIXERS, "other": OTHER_BASE}}
PLACEMENTS = [
    "all-gdn", "mamba,attention,kda", "sliding_window,attention,sliding_window", "all-attention", "every2nd-mamba",
    "attention,other,attention", "all-other",
]  # fmt: skip
PATTERNS = {
    "hybrid": ["gdn", "attention", "sliding_window", "kda", "mamba"],
    "rope bases": ["no rotation", "attention", "other base", "attention"],
}
KINDS = ["canon", "llama 4", "hybrid", "rope bases", "supernet", "mixed placements"]


@pytest.fixture(scope="module", params=KINDS)
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def folder(kind, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    if kind == "canon":  # wide enough for the kernels that join a norm and a convolution
        return canon_checkpoint(folder, hidden_size=272)
    if kind == "llama 4":
        from transformers import Llama4TextConfig

        hf_checkpoint(folder, Llama4TextConfig(**LLAMA4 | {"attn_temperature_tuning": True}))
        return folder
    if kind in PATTERNS:
        mixers = {**apriel2.MIXERS, "other base": OTHER_BASE, "no rotation": NO_ROTATION}
        return apriel2.checkpoint(folder, apriel2.pattern(PATTERNS[kind], mixers))
    return apriel2.checkpoint(folder, apriel2.fixed(SUPERNET, layers=3))


def provoke_races(monkeypatch, rng):
    """Delay some launches, and fill some new memory with NaN before it is written.

    A delay queues the following launches, so that each starts as early as possible; without it, gaps of a slow host
    hide races. NaN appears if a kernel reads memory that the previous kernel has not written yet. Both are kernels
    themselves, after which no kernel starts early, so they are rare.
    """
    for name, module in list(sys.modules.items()):
        if name.startswith("lamella.ops.") and hasattr(module, "dependent_launch"):
            original = module.dependent_launch

            def delayed(x, original=original):
                if x.is_cuda and rng.random() < 0.1:
                    torch.cuda._sleep(rng.randrange(20_000, 300_000))
                return original(x)

            monkeypatch.setattr(module, "dependent_launch", delayed)
    for name in ("empty", "empty_like"):
        allocate = getattr(torch, name)

        def filled(*args, allocate=allocate, **kwargs):
            tensor = allocate(*args, **kwargs)
            if tensor.is_cuda and tensor.is_floating_point() and tensor.numel() < 1 << 20 and rng.random() < 0.3:
                tensor.fill_(torch.nan)
            return tensor

        monkeypatch.setattr(torch, name, filled)


class ReferenceModel:
    """Greedy outputs and log-probabilities of single requests on the CPU."""

    def __init__(self, folder):
        self.llm = LLM(folder, device="cpu", dtype="float32", max_num_seqs=1, enable_prefix_caching=False)
        self.known = {}

    def check(self, prompt, placement, params, output):
        """Compare an output, up to the first token where the reference has a near-tie."""
        key = (tuple(prompt), placement, params.max_tokens)
        if key not in self.known:
            if placement is not None and self.llm.placement != placement:
                self.llm.set_placement(placement)
            asked = SamplingParams(temperature=0, max_tokens=params.max_tokens, ignore_eos=True, logprobs=VOCAB)
            self.known[key] = self.llm.generate([{"prompt_token_ids": prompt}], asked, use_tqdm=False)[0].outputs[0]
        expected = self.known[key]
        assert len(output.token_ids) == len(expected.token_ids)
        for index, (ours, row) in enumerate(zip(output.token_ids, expected.logprobs, strict=True)):
            best = expected.token_ids[index]
            for token, logprob in (output.logprobs[index] if output.logprobs is not None else {}).items():
                assert abs(logprob.logprob - row[token].logprob) <= 2e-3, (key, index, token)
            if ours != best:
                assert row[best].logprob - row[ours].logprob <= 1e-4, (key, index, ours, best)
                return


def one_round(folder, kind, rng, oracle):
    """Run one engine with random options; return the number of compared outputs."""
    options = {
        "block_size": rng.choice([1, 4, 16]),
        "max_num_seqs": rng.choice([2, 3, 3, 6]),
        "max_num_batched_tokens": rng.choice([7, 16, 64]),
        "enable_prefix_caching": rng.random() < 0.8,
        "enforce_eager": rng.random() < 0.4,
    }
    options["num_blocks"] = rng.choice([1, 2, 8]) * (100 // options["block_size"] + 2)
    if options["enable_prefix_caching"]:
        options["snapshot_prompts"] = rng.choice(["never", "always", "busy"])
        options["snapshot_interval"] = rng.choice([None, 1, 3])
    mixed, chooses = kind == "mixed placements", kind in ("supernet", "mixed placements")
    llm = LLM(folder, device="cuda", dtype="float32", mixed_placements=mixed, **options)
    llm.engine.memory.poison()
    config = llm.engine.model.config
    stems = [[rng.randrange(VOCAB) for _ in range(rng.choice([5, 20, 48]))] for _ in range(3)]
    compared = 0
    for _ in range(6):
        # A step may still be in flight: then the change is made with the next step, and `llm.placement` is the old one.
        usual = rng.choice(PLACEMENTS)
        if chooses and not mixed:
            llm.set_placement(usual)
        prompts, params, placements = [], [], []
        for _ in range(rng.randrange(1, 14)):
            prompt = rng.choice(stems)[: rng.randrange(1, 50)] + [rng.randrange(VOCAB) for _ in range(rng.randrange(9))]
            own = rng.choice(PLACEMENTS) if mixed else None
            placement = read_placement(own or usual, config) if chooses else None
            prompts.append(prompt)
            placements.append(placement)
            logprobs = rng.choice([None, 5, 5])
            params.append(
                SamplingParams(
                    temperature=0, max_tokens=rng.choice([1, 5, 20]), ignore_eos=True, logprobs=logprobs, placement=own
                )
            )
        if rng.random() < 0.3:  # a request that is abandoned beside the others
            stream = llm.stream(
                {"prompt_token_ids": stems[0]}, SamplingParams(max_tokens=9, placement=params[0].placement)
            )
            next(stream)
            stream.close()
        try:
            outputs = llm.generate([{"prompt_token_ids": ids} for ids in prompts], params, use_tqdm=False)
        except ParameterError:  # too long for so few blocks
            continue
        for prompt, placement, some, output in zip(prompts, placements, params, outputs, strict=True):
            oracle.check(prompt, placement, some, output.outputs[0])
            compared += 1
        llm.engine.state.check_integrity()
    return compared


def test_random_requests_with_delays_equal_single_requests(kind, folder, monkeypatch):
    rng = random.Random(f"{kind} {os.environ.get('LAMELLA_FUZZ_SEED', '0')}")
    oracle, compared, rounds = ReferenceModel(folder), 0, 0
    deadline = time.monotonic() + SECONDS
    while time.monotonic() < deadline or not compared:
        with monkeypatch.context() as patch:
            provoke_races(patch, rng)
            compared += one_round(folder, kind, rng, oracle)
        rounds += 1
    print(f"{kind}: {compared} outputs compared in {rounds} engines")
