"""Generate answers to many prompts at once. Usage: offline.py [MODEL]"""

import sys

from lamella import LLM, SamplingParams


def main() -> None:
    llm = LLM(sys.argv[1] if len(sys.argv) > 1 else "demo")
    prompts = ["copy a b c =", "mod 7 start 3 plus 5 times 2 =", "copy d e =", "mod 5 start 1 plus 4 ="]
    params = SamplingParams(temperature=0.7, top_p=0.95, max_tokens=24, n=2, seed=0, logprobs=0)
    for output in llm.generate(prompts, params):
        for completion in output.outputs:
            mean = completion.cumulative_logprob / len(completion.token_ids)
            print(f"{output.prompt!r} -> {completion.text!r} ({completion.finish_reason}, {mean:.2f} nats a token)")


if __name__ == "__main__":
    main()
