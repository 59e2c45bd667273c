"""Switch the mixers of a supernet, and give requests of one batch different ones.

Usage: placements.py [SUPERNET]. Without a model, a small random one is written to a temporary folder.
"""

import json
import sys
import tempfile
from pathlib import Path

from lamella import LLM, SamplingParams


def write_random_supernet(folder: Path) -> Path:
    """Write the config of an Apriel2 supernet: in each of four layers attention, a gated delta net or KDA."""
    norm = {"type": "rms_norm", "epsilon": 1e-5}
    convolution = {"kernel_size": 4}
    mixers = {
        "attention": {"type": "attention", "heads": 4, "head_groups": 2, "head_size": 16,
                      "rotary": {"type": "mistral_1d", "theta": 10000.0}},
        "gdn": {"type": "gdn", "value_heads": 4, "key_heads": 2, "key_head_dim": 16, "value_head_dim": 16,
                "convolution_layer": convolution},
        "kda": {"type": "kda", "heads": 4, "head_dim": 16, "convolution_layer": convolution},
    }  # fmt: skip
    block = {
        "mixer": {"type": "stochastic", "main_mixer_name": "attention", "mixers": mixers},
        "mlp": {"type": "mlp", "intermediate_size": 128, "activation": "silu", "gated": True},
        "normalization": norm,
    }
    config = {
        "architectures": ["Apriel2ForCausalLM"],
        "hidden_size": 64,
        "vocab_size": 500,
        "tie_word_embeddings": False,
        "decoder": {"type": "fixed", "num_blocks": 4, "block": block},
        "head": {"normalization": norm},
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def main() -> None:
    given = sys.argv[1] if len(sys.argv) > 1 else None
    model = given or write_random_supernet(Path(tempfile.mkdtemp()))
    options = {} if given else {"load_format": "dummy", "dtype": "float32", "skip_tokenizer_init": True}
    prompt = {"prompt_token_ids": list(range(1, 40))}
    greedy = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, detokenize=bool(given))

    llm = LLM(model, max_model_len=256, **options)
    for placement in ("all-attention", "every2nd-gdn", "all-kda"):
        llm.set_placement(placement)
        print(placement, llm.generate(prompt, greedy)[0].outputs[0].token_ids)

    mixed = LLM(model, max_model_len=256, mixed_placements=True, **options)
    placements = ["all-attention", "every2nd-gdn", "all-kda"]
    params = [
        SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, detokenize=bool(given), placement=name)
        for name in placements
    ]
    for name, output in zip(placements, mixed.generate([prompt] * len(params), params), strict=True):
        print("in one batch:", name, output.outputs[0].token_ids)


if __name__ == "__main__":
    main()
