"""Placements of a supernet at run time: selection, switching, mixed batches, and isolation of state."""

from __future__ import annotations

import asyncio
import random
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from apriel2_models import ATTENTION, MIXERS, SUPERNET, checkpoint, config, fixed, pattern
from helpers import VOCAB, poisoned_llm, random_prompts
from interrupts import interrupted
from lamella import LLM, AsyncLLM, SamplingParams
from lamella.checkpoint import load_model, open_checkpoint
from lamella.config import describe_placement, placed, read_placement
from lamella.config.hf_config import HFConfig
from lamella.config.placement import chosen_mixer
from lamella.errors import ConfigError, ParameterError
from lamella.layers.state_modules import PagedAttention
from lamella.layers.supernet.placing import find_active_state_modules
from lamella.models import Apriel2ForCausalLM

PARAMS = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True, logprobs=VOCAB)
PROMPTS = random_prompts((5, 37, 1, 18))
A, B, C = "all-gdn", "mamba,attention,kda", "swa,attention,sliding_window"
NAMES = ("attention", "sliding_window", "gdn", "kda", "mamba")


@pytest.fixture(scope="module")
def supernet(tmp_path_factory):
    return checkpoint(tmp_path_factory.mktemp("supernet"), fixed(SUPERNET, layers=3))


def engine(folder: Path, **options) -> LLM:
    return poisoned_llm(folder, max_num_batched_tokens=16, max_num_seqs=4, num_blocks=64, **options)


def answers(llm: LLM, prompts=PROMPTS, params=PARAMS) -> list:
    """Return tokens and all log-probabilities of each output, for bitwise comparison."""
    outputs = llm.generate(prompts, params, use_tqdm=False)
    return [
        (o.outputs[0].token_ids, [[row[i].logprob for i in range(VOCAB)] for row in o.outputs[0].logprobs])
        for o in outputs
    ]


@pytest.fixture(scope="module")
def alone(supernet):
    """Return the outputs of each placement in an engine that never had another one."""
    return {placement: answers(engine(supernet, placement=placement)) for placement in (A, B, C)}


def test_placements_differ(alone):
    assert alone[A] != alone[B] != alone[C]


def test_switch_leaks_no_state(supernet, alone):
    """Switch A -> B -> C -> A, with the prefix cache full of other placements' blocks."""
    llm = engine(supernet, placement=A)
    for placement in (A, B, C, A, B):
        llm.set_placement(placement)
        assert llm.placement == read_placement(placement, llm.engine.model.config)
        assert answers(llm) == alone[placement]
        again = [tokens for tokens, _ in answers(llm)]  # from the prefix cache, where it hits
        assert again == [tokens for tokens, _ in alone[placement]]
    assert llm.stats()["placement"] == "mamba,attention,kda"


def test_layers_use_the_memory_of_the_active_placement(supernet):
    """Also after a switch back to a placement whose memory is kept, if both placements share a layer's mixer."""
    llm = engine(supernet, placement=B)
    for placement in (C, B, C, A, B):
        llm.set_placement(placement)
        bound = []
        for state_module in find_active_state_modules(llm.engine.model, llm.placement):
            bound += (
                [state_module.k_cache, state_module.v_cache]
                if isinstance(state_module, PagedAttention)
                else state_module.rows
            )
        own = llm.engine.memory.tensors
        assert [(x.data_ptr(), x.shape) for x in bound] == [(x.data_ptr(), x.shape) for x in own]


def test_supernet_with_placement_equals_pruned_model(supernet, alone, tmp_path):
    """A checkpoint with the same tensors and no choice gives bitwise equal results."""
    model = load_model(open_checkpoint(supernet), dtype="float32")
    names = ["mamba", "attention", "kda"]
    values = pattern(names, MIXERS)
    pruned = Apriel2ForCausalLM.from_config(values)
    weights = dict(model.named_parameters())
    with torch.no_grad():
        for path, parameter in pruned.named_parameters():
            layer = path.split(".")[2] if path.startswith("model.layers.") else None
            source = path.replace(".mixer.", f".mixer.mixers.{names[int(layer)]}.") if layer else path
            parameter.copy_(weights[source])
    from helpers import save_lamella

    assert answers(engine(save_lamella(pruned, values, tmp_path))) == alone[B]


def test_state_is_kept_for_the_active_mixers_only(supernet):
    llm = engine(supernet, placement="all-attention")
    attention = llm.stats()
    llm.set_placement(A)
    gdn = llm.stats()
    assert [group["window"] for group in attention["block_groups"]] == [None] and gdn["block_groups"] == []
    heads, key_dim, value_dim, channels = 4, 8, 16, 2 * 2 * 8 + 4 * 16
    assert llm.engine.cost.bytes_per_request == 3 * 4 * (heads * key_dim * value_dim + 3 * channels)
    llm.set_placement("all-sliding_window")
    assert [group["window"] for group in llm.stats()["block_groups"]] == [6]


@pytest.mark.parametrize("running", ["finish", "recompute"])
def test_a_switch_while_requests_run(supernet, alone, running):
    """Running requests finish under the old placement, or are recomputed under the new one; later requests use the new
    one. No request mixes both."""
    llm = engine(supernet, placement=A)
    llm.engine.runner.async_scheduling = True
    stream = llm.stream(PROMPTS[1], PARAMS)
    first = [next(stream) for _ in range(3)][-1]
    llm.set_placement(B, running=running)
    assert len(first.outputs[0].token_ids) == 3
    later = llm.stream(PROMPTS[0], PARAMS)
    tokens = [output.outputs[0].token_ids for output in later][-1]
    rest = [output.outputs[0].token_ids for output in stream][-1]
    assert tokens == alone[B][0][0]
    if running == "finish":
        assert rest == alone[A][1][0]
    else:
        # The first tokens are kept; the new placement continues them.
        count = next(i for i, pair in enumerate(zip(rest, alone[A][1][0], strict=True)) if pair[0] != pair[1])
        assert count >= 3
        forced = {"prompt_token_ids": [*PROMPTS[1]["prompt_token_ids"], *rest[:4]]}
        params = SamplingParams(temperature=0, max_tokens=len(rest) - 4, ignore_eos=True)
        assert llm.generate(forced, params, use_tqdm=False)[0].outputs[0].token_ids == rest[4:]
    assert describe_placement(llm.placement) == B


def test_a_cancelled_request_that_waits_for_a_switch(supernet):
    llm = engine(supernet, placement=A)
    running = llm.stream(PROMPTS[1], PARAMS)
    next(running)
    llm.set_placement(B)
    waiting = llm.engine.make_job("waiting", PROMPTS[0], PARAMS)
    llm.engine.add(waiting)
    assert llm.engine.cancel("waiting") is waiting and waiting.finished
    running.close()
    while llm.engine.has_work:
        llm.engine.step()
    assert describe_placement(llm.placement) == B


@pytest.mark.parametrize(
    ("bad", "match"),
    [
        ("all-rwkv", "layer 0 has no mixer 'rwkv'; it has attention, sliding_window, gdn, kda, mamba"),
        ("gdn,gdn", "2 names, for 3 stochastic layers of 3"),
        ({7: "gdn"}, "layer 7 has no choice; those that have: 0, 1, 2"),
        (["gdn", 3, "gdn"], "layer 1 has no mixer 3"),
        ("every0th-gdn", "every 0th layer is none"),
    ],
)
def test_a_bad_placement_changes_nothing(supernet, alone, bad, match):
    llm = engine(supernet, placement=A)
    with pytest.raises(ConfigError, match=match):
        llm.set_placement(bad)
    with pytest.raises(ConfigError, match="running='maybe': must be finish or recompute"):
        llm.set_placement(B, running="maybe")
    assert answers(llm) == alone[A] and describe_placement(llm.placement) == A


def test_placement_too_small_for_a_running_request_raises(supernet, alone):
    """A running request is too long for the pools of the new placement: the switch raises and changes nothing."""
    llm = engine(supernet, placement=A)
    stream = llm.stream(PROMPTS[1], PARAMS)
    next(stream)
    llm.engine.options.__dict__["num_blocks"] = 2
    with pytest.raises(ConfigError, match="placement: request 0 would not fit: prompt and max_tokens need 3 blocks"):
        llm.set_placement("all-attention", running="recompute")
    assert [output.outputs[0].token_ids for output in stream][-1] == alone[A][1][0]


def test_requests_of_several_placements_share_a_batch(supernet, alone):
    """Each request is bitwise equal to its run alone, for all other requests in the batch."""
    llm = engine(supernet, mixed_placements=True, placement=A)
    own = [None, B, C, B]
    params = [SamplingParams(temperature=0, max_tokens=6, ignore_eos=True, logprobs=VOCAB, placement=p) for p in own]
    mixed = answers(llm, PROMPTS, params)
    for index, placement in enumerate(own):
        tokens, logprobs = alone[placement or A][index]
        assert mixed[index][0] == tokens
        assert torch.tensor(mixed[index][1]).sub(torch.tensor(logprobs)).abs().max() <= 2e-5


def test_mixed_batch_is_bitwise_equal_to_single_placement_batches(supernet):
    """Requests of one placement in a batch are bitwise equal with and without requests of another placement."""
    llm = engine(supernet, mixed_placements=True, placement=A, enable_prefix_caching=False)
    params = [
        SamplingParams(temperature=0, max_tokens=6, ignore_eos=True, logprobs=VOCAB, placement=p) for p in (A, B, A, B)
    ]
    prompts = random_prompts((3, 3, 3, 3))
    both = answers(llm, prompts, params)
    for start in (0, 1):
        assert answers(llm, prompts[start::2], params[start::2]) == both[start::2]


def test_prefixes_of_different_placements_do_not_hit(supernet):
    """A prompt hits under its own placement, and not under another one."""
    llm = engine(supernet, mixed_placements=True, placement=A, snapshot_prompts="always")
    prompt = random_prompts((40,))[0]

    def cached(placement):
        params = SamplingParams(temperature=0, max_tokens=1, placement=placement)
        return llm.generate([prompt], params, use_tqdm=False)[0].num_cached_tokens

    assert [cached(p) for p in (A, B, A, B, C)] == [0, 0, 32, 32, 0]


def test_a_request_of_another_placement_needs_state_for_it(supernet):
    with pytest.raises(ParameterError, match=r"placement='mamba,attention,kda': the engine keeps state for 'all-gdn'"):
        engine(supernet, placement=A).generate(PROMPTS[0], SamplingParams(placement=B), use_tqdm=False)
    llm = engine(supernet, mixed_placements=True)
    with pytest.raises(ParameterError, match="no mixer 'rwkv'"):
        llm.generate(PROMPTS[0], SamplingParams(placement="all-rwkv"), use_tqdm=False)


def test_a_switch_of_the_default_among_mixed_requests(supernet, alone):
    """Running requests keep their placement; later ones use the new default."""
    llm = engine(supernet, mixed_placements=True, placement=A)
    stream = llm.stream(PROMPTS[1], PARAMS)
    next(stream)
    llm.set_placement(B)
    later = answers(llm, PROMPTS[:1])
    assert later[0][0] == alone[B][0][0]
    assert [output.outputs[0].token_ids for output in stream][-1] == alone[A][1][0]


def test_models_without_a_choice(tmp_path):
    folder = checkpoint(tmp_path, fixed(MIXERS["gdn"]))
    llm = engine(folder)
    assert llm.placement == (None, None) and llm.mixer_names() == ()
    with pytest.raises(ConfigError, match="no layer of the model has a choice of mixers"):
        llm.set_placement("all-gdn")
    with pytest.raises(ConfigError, match="mixed_placements=True: no layer of the model has a choice"):
        engine(folder, mixed_placements=True)


def test_string_forms_of_placements():
    values = pattern(["one", "plain", "one", "one", "one", "one"], {"one": SUPERNET, "plain": ATTENTION})
    model = Apriel2ForCausalLM.read_config(HFConfig(values))

    def names(written):
        return [name for name in read_placement(written, model) if name is not None]

    assert names(None) == ["attention"] * 5
    assert names("all-swa") == ["sliding_window"] * 5
    assert names("every2nd-gdn") == ["attention", "gdn", "attention", "gdn", "attention"]
    assert names("every1st-kda") == ["kda"] * 5
    assert names("every21st-kda") == ["attention"] * 5
    assert names("bookend-attn-mamba") == ["attention", "attention", "mamba", "attention", "attention"]
    assert names("gdn, kda,attn,swa,mamba") == ["gdn", "kda", "attention", "sliding_window", "mamba"]
    assert names(["gdn", "ignored", "gdn", "gdn", "gdn", "kda"]) == ["gdn"] * 4 + ["kda"]  # one a layer of the model
    assert names({"3": "gdn", 0: "kda"}) == ["kda", "attention", "gdn", "attention", "attention"]
    assert read_placement("all-gdn", model)[1] is None
    assert describe_placement(read_placement("every2nd-gdn", model)) == "attention,gdn,attention,gdn,attention"
    assert all(layer.mixer.canons == () for layer in placed(model, read_placement("all-gdn", model)).layers)


def test_missing_mixer_error_names_the_layer():
    with pytest.raises(ConfigError, match=r"^placement: layer 1 has several mixers"):
        chosen_mixer(("gdn", None), 1)


def test_async_llm(supernet, alone):
    async def run():
        async with AsyncLLM(
            supernet, device="cpu", placement=A, max_num_batched_tokens=16, max_num_seqs=4, num_blocks=64
        ) as llm:
            await llm.set_placement(B)
            async for output in llm.generate(PROMPTS[1], PARAMS):
                last = output
            with pytest.raises(ConfigError, match="no mixer 'rwkv'"):
                await llm.set_placement("all-rwkv")
            return last.outputs[0].token_ids

    assert asyncio.run(run()) == alone[B][1][0]


def test_two_ranks(supernet, alone):
    """Both ranks switch, and compute equal mixed batches."""
    options = {"max_num_batched_tokens": 16, "max_num_seqs": 4, "num_blocks": 64, "device": "cpu"}
    llm = LLM(supernet, tensor_parallel_size=2, placement=A, **options)
    try:
        for placement in (A, B, C, A):
            llm.set_placement(placement)
            assert [tokens for tokens, _ in answers(llm)] == [tokens for tokens, _ in alone[placement]]
    finally:
        llm.engine.close()
    llm = LLM(supernet, tensor_parallel_size=2, placement=A, mixed_placements=True, **options)
    try:
        own = [None, B, C, B]
        params = [SamplingParams(temperature=0, max_tokens=6, ignore_eos=True, placement=p) for p in own]
        outputs = llm.generate(PROMPTS, params, use_tqdm=False)
        expected = [alone[placement or A][index][0] for index, placement in enumerate(own)]
        assert [output.outputs[0].token_ids for output in outputs] == expected
    finally:
        llm.engine.close()


def test_supernet_whose_layers_have_different_mixers(tmp_path):
    """A placement can use mixer names that only some layers have."""
    some = {"type": "stochastic", "main_mixer_name": "gdn", "mixers": {name: MIXERS[name] for name in ("gdn", "kda")}}
    decoder = pattern(["all", "some"], {"all": SUPERNET, "some": some})["decoder"]
    llm = engine(checkpoint(tmp_path, config(decoder)))
    assert llm.mixer_names() == NAMES and llm.placement == ("attention", "gdn")
    llm.set_placement({1: "kda"})
    assert llm.placement == ("attention", "kda")
    with pytest.raises(ConfigError, match="layer 1 has no mixer 'attention'; it has gdn, kda"):
        llm.set_placement("all-attention")


def test_mixer_named_like_a_torch_attribute(tmp_path):
    with pytest.raises(ConfigError, match=r"layers\.0\.mixer: a mixer cannot be called 'keys'"):
        checkpoint(tmp_path, fixed({"type": "stochastic", "mixers": {"keys": ATTENTION, "gdn": MIXERS["gdn"]}}))


def test_switch_keeps_explicit_placements_of_requests(supernet, alone):
    """Neither a running request that would be recomputed, nor one that waits for a switch that is cancelled."""
    llm = engine(supernet, placement=A)
    own = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True, placement=A)
    stream = llm.stream(PROMPTS[1], own)
    next(stream)
    with pytest.raises(ConfigError, match="placement: request 0 asked for 'all-gdn', and has not finished yet"):
        llm.set_placement(B, running="recompute")
    llm.set_placement(B)
    params = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True, placement=B)
    later = llm.engine.make_job("later", PROMPTS[0], params)
    llm.engine.add(later)
    with pytest.raises(ConfigError, match="placement: request later asked for 'mamba,attention,kda'"):
        llm.set_placement(A)
    assert [output.outputs[0].token_ids for output in stream][-1] == alone[A][1][0]
    while not later.finished:
        llm.engine.step()
    assert later.output().outputs[0].token_ids == alone[B][0][0]


def tokens_of(stream):
    *_, last = stream
    return last.outputs[0].token_ids


def tokens(found):
    return [ids for ids, _ in found]


def tokens_of_all(llm):
    return [output.outputs[0].token_ids for output in llm.generate(PROMPTS, PARAMS, use_tqdm=False)]


@pytest.mark.parametrize("mixed", [False, True])
def test_stream_started_after_a_switch_uses_the_new_placement(supernet, alone, mixed):
    llm = engine(supernet, placement=A, mixed_placements=mixed)
    waiting = [llm.stream(prompt, PARAMS) for prompt in PROMPTS]
    own = [llm.stream(prompt, replace(PARAMS, placement=A)) for prompt in PROMPTS]
    llm.set_placement(B)
    assert [tokens_of(stream) for stream in waiting] == tokens(alone[B])
    if mixed:  # its own placement is served under any engine placement
        assert [tokens_of(stream) for stream in own] == tokens(alone[A])
    else:
        for stream in own:
            with pytest.raises(ParameterError, match=r"^placement='all-gdn': the engine keeps state for"):
                next(stream)
    assert llm.stats()["blocks_used"] == 0 and not llm.engine.has_work
    # Nothing was keyed under the other placement.
    assert tokens_of_all(llm) == tokens(alone[B])
    llm.set_placement(A)
    assert tokens_of_all(llm) == tokens(alone[A])


def test_stream_started_during_a_pending_switch_runs_after_it(supernet, alone):
    llm = engine(supernet, placement=A)
    running, late = llm.stream(PROMPTS[0], PARAMS), llm.stream(PROMPTS[1], PARAMS)
    next(running)
    llm.set_placement(B)
    assert tokens_of(late) == alone[B][1][0]
    assert tokens_of(running) == alone[A][0][0]


def test_stream_that_no_longer_fits_raises_at_its_start(supernet):
    llm = engine(supernet, placement="all-gdn")  # no blocks at all
    long = llm.stream(random_prompts([300])[0], PARAMS)
    llm.set_placement("all-attention")
    llm.engine.state.block_pools[0].capacity = 3
    with pytest.raises(ParameterError, match="num_blocks"):
        next(long)


@pytest.mark.parametrize("running", ["finish", "recompute"])
@pytest.mark.parametrize("mixed", [False, True])
def test_interrupted_switch_is_recovered(supernet, alone, running, mixed):
    """Running requests get tokens of their placement; afterwards the engine has one of the two placements."""
    rng = random.Random(f"{running} {mixed}")
    llm = LLM(supernet, max_num_batched_tokens=16, max_num_seqs=4, num_blocks=64, device="cpu", mixed_placements=mixed)
    llm.set_placement(A)
    for _ in range(15):
        busy = rng.random() < 0.5
        stream = llm.stream(PROMPTS[1], PARAMS)
        if busy:
            next(stream)
        with interrupted(rng.randrange(1, 400), KeyboardInterrupt()) as lines, suppress(KeyboardInterrupt):
            llm.set_placement(B, running)
            if busy:
                llm.generate(PROMPTS[:1], PARAMS, use_tqdm=False)
        if busy:
            assert len(tokens_of(stream)) == PARAMS.max_tokens, lines.where
        found = tokens_of_all(llm)
        assert found in (tokens(alone[A]), tokens(alone[B])), lines.where
        now = B if found == tokens(alone[B]) else A
        assert llm.placement == read_placement(now, llm.engine.model.config), lines.where
        llm.set_placement(A)
        assert tokens_of_all(llm) == tokens(alone[A]), lines.where
        llm.engine.state.check_integrity()
        assert not llm.engine.has_work, lines.where
