"""Serve concurrent requests of one event loop, and cancel one. Usage: streaming.py [MODEL]"""

import asyncio
import sys

from lamella import AsyncLLM, SamplingParams


async def answer(engine: AsyncLLM, name: str, prompt: str) -> None:
    printed = 0
    async for output in engine.generate(prompt, SamplingParams(temperature=0, max_tokens=32), request_id=name):
        text = output.outputs[0].text
        print(f"[{name}] {text[printed:]!r}")
        printed = len(text)


async def impatient(engine: AsyncLLM) -> None:
    params = SamplingParams(temperature=0, max_tokens=200, ignore_eos=True)
    async for output in engine.generate("copy a b c d e f =", params):
        if len(output.outputs[0].token_ids) >= 4:
            print("[impatient] leaves after 4 tokens; the engine drops the request")
            break


async def main() -> None:
    async with AsyncLLM(sys.argv[1] if len(sys.argv) > 1 else "demo") as engine:
        await asyncio.gather(
            answer(engine, "copy", "copy a b c ="),
            answer(engine, "mod", "mod 7 start 3 plus 5 times 2 ="),
            impatient(engine),
        )


if __name__ == "__main__":
    asyncio.run(main())
