"""Many callers on one event loop: each gets its own tokens, and leaving does no harm."""

from __future__ import annotations

import asyncio

import pytest

from helpers import canon_checkpoint, random_prompts
from lamella import LLM, AsyncLLM, SamplingParams
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


def test_leaving_and_aborting_free_what_was_held(folder, expected):
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
            if stats["running"] == stats["waiting"] == stats["pages_used"] == 0:
                return
            await asyncio.sleep(0.02)
        raise AssertionError(stats)

    run(folder, scenario)


def test_a_bad_request_is_refused_and_others_go_on(folder, expected):
    async def scenario(llm):
        good = asyncio.create_task(collect(llm, PROMPTS[0]))
        with pytest.raises(ParameterError, match="prompt_token_ids"):
            await collect(llm, {"prompt_token_ids": [10**6]})
        return await good

    assert run(folder, scenario)[-1].outputs[0].token_ids == expected[0]


def test_a_failed_step_ends_its_requests_and_not_the_engine(folder, expected):
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


def test_two_requests_of_one_id_are_refused(folder):
    async def scenario(llm):
        first = asyncio.create_task(collect(llm, PROMPTS[0], request_id="same"))
        await asyncio.sleep(0)  # until the task has asked
        with pytest.raises(ParameterError, match="same"):
            await collect(llm, PROMPTS[1], request_id="same")
        return await first

    assert run(folder, scenario)[-1].finished


def test_shutdown_ends_what_runs(folder):
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


def test_prefixes_are_found_and_forgotten(folder):
    prompt = random_prompts([40], seed=1)[0]

    async def scenario(llm):
        hits = [(await collect(llm, prompt))[-1].num_cached_tokens for _ in range(2)]
        llm.reset_prefix_cache()
        return [*hits, (await collect(llm, prompt))[-1].num_cached_tokens]

    assert run(folder, scenario) == [0, 32, 0]
