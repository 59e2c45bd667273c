"""Run a model of lamella inside vLLM: the plugin registers itself. Usage: vllm_offline.py [MODEL]"""

import sys

from vllm import LLM, SamplingParams

from lamella.demo import CHECKPOINT


def main() -> None:
    llm = LLM(sys.argv[1] if len(sys.argv) > 1 else str(CHECKPOINT), max_model_len=256, gpu_memory_utilization=0.3)
    outputs = llm.generate(["copy a b c =", "copy d e ="], SamplingParams(temperature=0, max_tokens=16))
    for output in outputs:
        print(repr(output.prompt), repr(output.outputs[0].text))


if __name__ == "__main__":
    main()
