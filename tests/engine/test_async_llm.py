"""AsyncLLM: concurrent callers, cancellation, failed steps, and shutdown."""

from __future__ import annotations

import asyncio
import time
from unittest import mock

import pytest

from helpers import canon_checkpoint, random_prompts
from lamella import LLM, AsyncLLM, SamplingParams
from lamella.engine.requests.completion import Completion
from lamella.engine.requests.tokenizer import Tokenizer
from lamella.errors import ClosedError, ParameterError

PARAMS = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
PROMPTS = random_prompts([3, 1, 20, 7, 40, 2])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return canon_checkpoint(tmp_path_factory.mktemp("canon"))


@pytest.fixture(scope="module")
def expected(folder):
    outputs = LLM(folder, device="cpu").generate(PROMPTS, PARAMS, use_tqdm=False)
    return [output.outputs[0].token_ids for output in outputs]


def run(folder, scenario):
    async def main():
        async with AsyncLLM(folder, device="cpu", max_num_batched_tokens=16, max_num_seqs=4) as llm:
            return await asyncio.wait_for(scenario(llm), timeout=60)

    return asyncio.run(main())


async def collect(llm, prompt, params=PARAMS, **options):
    return [output async for output in llm.generate(prompt, params, **options)]


def test_concurrent_requests_get_their_own_tokens(folder, expected):
    async def scenario(llm):
        return await asyncio.gather(*(collect(llm, prompt) for prompt in PROMPTS))

    for outputs, tokens in zip(run(folder, scenario), expected, strict=True):
        assert outputs[-1].finished
        assert outputs[-1].outputs[0].token_ids == tokens
        assert [len(output.outputs[0].token_ids) for output in outputs] == list(range(1, 13))


def test_leaving_or_aborting_frees_blocks_and_slots(folder, expected):
    long = SamplingParams(temperature=0, max_tokens=400, ignore_eos=True)

    async def scenario(llm):
        async def leave():
            async for _ in llm.generate(PROMPTS[0], long):
                break

        async def cancelled():
            task = asyncio.create_task(collect(llm, PROMPTS[1], long))
            await asyncio.sleep(0.05)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task

        async def aborted():
            outputs = []
            async for output in llm.generate(PROMPTS[2], long, request_id="mine"):
                outputs.append(output)
                llm.abort("mine")
            return outputs

        *_, aborted_outputs, survivor = await asyncio.gather(leave(), cancelled(), aborted(), collect(llm, PROMPTS[3]))
        assert aborted_outputs[-1].outputs[0].finish_reason == "abort"
        assert aborted_outputs[-1].finished
        assert survivor[-1].outputs[0].token_ids == expected[3]
        for _ in range(100):
            stats = llm.stats()
            if stats["running"] == stats["waiting"] == stats["blocks_used"] == 0:
                return
            await asyncio.sleep(0.02)
        raise AssertionError(stats)

    run(folder, scenario)


def test_bad_request_raises_and_others_continue(folder, expected):
    async def scenario(llm):
        good = asyncio.create_task(collect(llm, PROMPTS[0]))
        with pytest.raises(ParameterError, match="prompt_token_ids"):
            await collect(llm, {"prompt_token_ids": [10**6]})
        return await good

    assert run(folder, scenario)[-1].outputs[0].token_ids == expected[0]


def test_failed_step_ends_its_requests_but_not_the_engine(folder, expected):
    async def scenario(llm):
        healthy = llm.engine.runner.launch

        def fail(step):
            llm.engine.runner.launch = healthy
            raise RuntimeError("device lost")

        llm.engine.runner.launch = fail
        with pytest.raises(RuntimeError, match="device lost"):
            await collect(llm, PROMPTS[0])
        return await collect(llm, PROMPTS[1])

    assert run(folder, scenario)[-1].outputs[0].token_ids == expected[1]


def test_duplicate_request_id_raises(folder):
    async def scenario(llm):
        first = asyncio.create_task(collect(llm, PROMPTS[0], request_id="same"))
        await asyncio.sleep(0)  # until the task has submitted its request
        with pytest.raises(ParameterError, match="same"):
            await collect(llm, PROMPTS[1], request_id="same")
        return await first

    assert run(folder, scenario)[-1].finished


def test_shutdown_ends_running_requests(folder):
    async def main():
        llm = AsyncLLM(folder, device="cpu")
        task = asyncio.create_task(
            collect(llm, PROMPTS[0], SamplingParams(temperature=0, max_tokens=400, ignore_eos=True))
        )
        await asyncio.sleep(0.05)
        await asyncio.get_running_loop().run_in_executor(None, llm.shutdown)
        outputs = await asyncio.wait_for(task, timeout=30)
        assert outputs[-1].outputs[0].finish_reason == "abort"
        with pytest.raises(ClosedError, match="shut down"):
            await collect(llm, PROMPTS[0])

    asyncio.run(main())


def test_prefixes_hit_until_the_cache_is_reset(folder):
    prompt = random_prompts([40], seed=1)[0]

    async def scenario(llm):
        hits = [(await collect(llm, prompt))[-1].num_cached_tokens for _ in range(2)]
        llm.reset_prefix_cache()
        return [*hits, (await collect(llm, prompt))[-1].num_cached_tokens]

    assert run(folder, scenario) == [0, 32, 0]


LONG = SamplingParams(temperature=0, max_tokens=400, ignore_eos=True)


async def until_idle(llm):
    """Wait until the engine has no request; fail after two seconds."""
    for _ in range(100):
        if not llm.engine.has_work and not llm._queues:
            llm.engine.state.check_integrity()
            return
        await asyncio.sleep(0.02)
    raise AssertionError(llm.stats())


def slow(llm, seconds=0.02):
    """Make every step slow, so that commands queue up meanwhile."""
    real = llm.engine.step

    def step():
        time.sleep(seconds)
        return real()

    llm.engine.step = step


def test_requests_cancelled_before_they_start_never_run(folder, expected):
    async def scenario(llm):
        slow(llm)
        first = asyncio.create_task(collect(llm, PROMPTS[0]))
        await asyncio.sleep(0.03)
        before = llm.stats()["requests"]
        victims = [asyncio.create_task(collect(llm, prompt, LONG)) for prompt in PROMPTS]
        await asyncio.sleep(0)  # they have ordered, the engine is inside a step
        for victim in victims:
            victim.cancel()
        await asyncio.gather(*victims, return_exceptions=True)
        outputs = await first
        await until_idle(llm)
        assert llm.stats()["requests"] == before
        return outputs

    assert run(folder, scenario)[-1].outputs[0].token_ids == expected[0]


def test_closed_event_loop_cancels_its_requests(folder):
    llm = AsyncLLM(folder, device="cpu")
    slow(llm, 0.01)
    loop, kept = asyncio.new_event_loop(), []

    async def begin():
        for prompt in PROMPTS[:3]:
            kept.append(llm.generate(prompt, LONG))
            await anext(kept[-1])

    loop.run_until_complete(begin())
    loop.close()
    asyncio.run(until_idle(llm))
    assert asyncio.run(collect(llm, PROMPTS[0]))[-1].finished
    llm.shutdown()


def test_long_prompt_is_cancelled_between_chunks(folder):
    """Between chunks no output is delivered, so the reader's queue does not show that it was closed."""

    async def scenario(llm):
        slow(llm, 0.01)
        task = asyncio.create_task(collect(llm, random_prompts([480], seed=3)[0]))
        await asyncio.sleep(0.05)
        task.cancel()
        await until_idle(llm)
        assert llm.stats()["prompt_tokens"] < 300

    run(folder, scenario)


class Panic(BaseException):
    """Error that is not an `Exception`, like panics of the tokenizers library."""


Panic.__name__ = "PanicException"


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize(
    "error", [SystemExit("signal"), KeyboardInterrupt(), Panic("not of a tokenizer"), GeneratorExit()]
)
@pytest.mark.parametrize("where", ["step", "order"])
def test_end_of_the_engine_thread_ends_every_call(folder, error, where):
    def fail(*_):
        raise error

    async def main():
        llm = AsyncLLM(folder, device="cpu", max_num_seqs=2)
        slow(llm)
        calls = [asyncio.create_task(collect(llm, prompt, LONG)) for prompt in PROMPTS[:4]]
        await asyncio.sleep(0.05)
        if where == "step":
            llm.engine.runner.launch = fail
        else:
            llm._order(fail)
        late = asyncio.create_task(collect(llm, PROMPTS[4]))  # ordered, and perhaps not taken
        change = asyncio.create_task(llm.set_placement(None))
        for result in await asyncio.wait_for(asyncio.gather(*calls, late, return_exceptions=True), 10):
            assert isinstance(result, ClosedError) and type(error).__name__ in str(result)
        await asyncio.wait_for(asyncio.gather(change, return_exceptions=True), 10)
        for _ in range(2):
            with pytest.raises(ClosedError, match="the engine has failed"):
                await asyncio.wait_for(collect(llm, PROMPTS[0]), 10)
            with pytest.raises(ClosedError, match="the engine has failed"):
                await asyncio.wait_for(llm.set_placement(None), 10)
        llm.shutdown()

    asyncio.run(main())


def test_failed_command_ends_no_other_request(folder, expected):
    def fail():
        raise RuntimeError("an order")

    async def scenario(llm):
        slow(llm)
        task, refused = asyncio.create_task(collect(llm, PROMPTS[0])), []
        await asyncio.sleep(0.03)
        llm._order(fail, refused.append)
        outputs = await task
        assert [str(error) for error in refused] == ["an order"]
        return outputs

    assert run(folder, scenario)[-1].outputs[0].token_ids == expected[0]


def test_tokenizer_panic_ends_only_its_request(folder, expected):
    class Library:
        def encode(self, text, add_special_tokens=True):
            raise Panic("post-processor names an unknown token")

        def decode(self, ids, skip_special_tokens):
            raise Panic("decoder")

    async def scenario(llm):
        llm.engine.admission.tokenizer = tokenizer = object.__new__(Tokenizer)
        tokenizer._tokenizer, tokenizer.vocab_size, tokenizer.special_ids = Library(), 128, frozenset()
        plain = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, detokenize=False)
        good = asyncio.create_task(collect(llm, PROMPTS[0], plain))
        with pytest.raises(ParameterError, match=r"^prompt: the tokenizer fails \(post-processor"):
            await collect(llm, "text", plain)
        with pytest.raises(ParameterError, match=r"^detokenization: the tokenizer fails \(decoder\)"):
            await collect(llm, PROMPTS[1])
        return await good

    assert run(folder, scenario)[-1].outputs[0].token_ids == expected[0]


def test_failed_detokenization_ends_only_its_request(folder, expected):
    """Detokenization of one of three requests fails from its third token on."""

    async def scenario(llm):
        real = Completion._append

        def append(completion, token_id, logprobs):
            if completion.request.request_id == "bad" and len(completion.request.output_token_ids) == 2:
                completion.request.output_token_ids.append(token_id)
                raise ValueError("no text")
            return real(completion, token_id, logprobs)

        with mock.patch.object(Completion, "_append", append):
            bad, *good = await asyncio.gather(
                collect(llm, PROMPTS[0], request_id="bad"), collect(llm, PROMPTS[1]), collect(llm, PROMPTS[2])
            )
        output = bad[-1].outputs[0]
        assert (output.finish_reason, output.error) == ("error", "ValueError: no text")
        assert output.token_ids == expected[0][:2] and llm.stats()["errors"] == 1
        await until_idle(llm)
        return good

    assert [outputs[-1].outputs[0].token_ids for outputs in run(folder, scenario)] == expected[1:3]


def test_slow_reader_gets_newest_and_last_output(folder):
    async def scenario(llm):
        generator = llm.generate(PROMPTS[0], SamplingParams(temperature=0, max_tokens=100, ignore_eos=True))
        first = await anext(generator)
        await until_done(llm)
        rest = [output async for output in generator]
        assert len(first.outputs[0].token_ids) >= 1 and len(rest) <= 16
        assert rest[-1].finished and len(rest[-1].outputs[0].token_ids) == 100

    async def until_done(llm):
        while llm.engine.has_work:
            await asyncio.sleep(0.01)

    run(folder, scenario)
