"""The out-of-tree mixer of docs/adding_a_mixer.md in both engines."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

import pytest

pytest.importorskip("vllm")
import torch
from plugin_helpers import LENGTHS, prompts_of, running

from helpers import VOCAB
from lamella.checkpoint import load_model, open_checkpoint

pytestmark = pytest.mark.vllm
BLOCK = Path(__file__).parents[2] / "docs" / "adding_a_mixer.md"
NAME, TYPE = "AveragingForCausalLM", "averaging"
VALUES = {
    "architectures": [NAME],
    "model_type": TYPE,
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "head_dim": 32,
    "width": 48,
    "max_position_embeddings": 256,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    import json

    from safetensors.torch import save_file

    from lamella.checkpoint.names import targets

    path = tmp_path_factory.mktemp("mixer")
    code = dict(re.findall(r"```python\n# file: (\S+)\n(.*?)```", BLOCK.read_text(), re.DOTALL))["averaging.py"]
    (path / "averaging.py").write_text(code)
    # As an installed package has it: vLLM looks at model classes in a process of its own.
    package = path / "averaging-0.1.dist-info"
    package.mkdir()
    (package / "METADATA").write_text("Metadata-Version: 2.1\nName: averaging\nVersion: 0.1\n")
    names = "".join(f"{name} = averaging:AVERAGING\n" for name in (NAME, TYPE))
    (package / "entry_points.txt").write_text(f"[lamella.architectures]\n{names}")
    sys.path.insert(0, str(path))
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(path), before)))
    try:
        from lamella.vllm_plugin import register

        register()
        (path / "config.json").write_text(json.dumps(VALUES))
        checkpoint = open_checkpoint(path)
        model = load_model(checkpoint, "float32", torch.device("cpu"), load_format="dummy", seed=3)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    parameter.mul_(6)  # so that the tokens depend on the state
        named = targets(model, checkpoint.names).items()
        save_file(
            {name: t.parameter[t.start : t.stop].detach().clone() for name, t in named}, path / "model.safetensors"
        )
        yield path
    finally:
        sys.path.remove(str(path))
        os.environ.pop("PYTHONPATH")
        if before is not None:
            os.environ["PYTHONPATH"] = before


@pytest.fixture(scope="module")
def logprobs(folder):
    """Return the log-probabilities of a sequence by one full float64 forward of the reference."""
    from lamella.parity.reference_model import ReferenceModel
    from lamella.parity.tested_model import ModelUnderTest

    tested = ModelUnderTest.open(str(folder))
    oracle = ReferenceModel(tested.config, tested.weights(torch.device("cpu")), torch.float64)
    return lambda ids: oracle.logits(ids).log_softmax(-1)


def check(outputs, logprobs):
    for prompt, tokens in outputs:
        table = logprobs([*prompt, *tokens])[len(prompt) - 1 : -1]
        chosen = table.gather(1, torch.tensor(tokens)[:, None])[:, 0]
        assert (table.amax(-1) - chosen).max() <= 1e-3, (len(prompt), tokens)


@pytest.mark.parametrize("compiled", [False, True])
def test_it_runs_in_vllm(folder, logprobs, compiled):
    from vllm import SamplingParams

    prompts = prompts_of(*LENGTHS)
    params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, detokenize=False)
    options = {"max_num_batched_tokens": 24, "max_num_seqs": 3, "enforce_eager": not compiled}
    with running(folder, **options) as llm:
        outputs = llm.generate([{"prompt_token_ids": ids} for ids in prompts], params, use_tqdm=False)
        again = llm.generate([{"prompt_token_ids": ids} for ids in prompts[-2:]], params, use_tqdm=False)
    check(zip(prompts, [list(o.outputs[0].token_ids) for o in outputs], strict=True), logprobs)
    check(zip(prompts[-2:], [list(o.outputs[0].token_ids) for o in again], strict=True), logprobs)


def test_it_runs_in_our_engine(folder, logprobs):
    from lamella import LLM, SamplingParams

    llm = LLM(folder, device="cpu", max_num_batched_tokens=24, max_num_seqs=3, num_blocks=64)
    prompts = prompts_of(*LENGTHS)
    params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    outputs = llm.generate([{"prompt_token_ids": ids} for ids in prompts], params, use_tqdm=False)
    check(zip(prompts, [o.outputs[0].token_ids for o in outputs], strict=True), logprobs)
