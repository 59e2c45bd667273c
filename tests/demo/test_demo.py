"""Questions of the demo, and accuracy of the bundled model."""

import random
from functools import cache

import pytest
import torch
from tokenizers import Tokenizer

from lamella.checkpoint.files import DEMO, DEMO_FOLDER, find_folder
from lamella.demo import CHECKPOINT
from lamella.demo.questions import (
    END,
    MAX_TOKENS,
    OPERATIONS,
    TASKS,
    UNKNOWN,
    VOCABULARY,
    Question,
    held_out,
    is_held_out,
    is_right,
    make_question,
)
from lamella.models import LlamaCanonForCausalLM

EVERY_TASK = pytest.mark.parametrize("task", TASKS)


@cache
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(CHECKPOINT / "tokenizer.json"))


def some(task: str, count: int = 200) -> list[Question]:
    rng = random.Random(7)
    return [make_question(task, rng) for _ in range(count)]


def solve(question: Question) -> list[str]:
    """Return the answer, computed from the prompt alone."""
    words = question.prompt.split()
    assert words.pop() == "="
    if question.task == "copy":
        return words[1:]
    if question.task == "hop":
        start, hops = words[words.index("from") + 1], int(words[-1])
        arrows = dict(zip(words[1:-4:4], words[3:-4:4], strict=True))
        way = [start]
        for _ in range(hops):
            way.append(arrows[way[-1]])
        return way[1:]
    assert words[:3] == ["mod", "7", "start"]
    value = int(words[3])
    for word, operand in zip(words[4::2], words[5::2], strict=True):
        value = OPERATIONS[word](value, int(operand))
    return [str(value)]


def answer_greedily(model: LlamaCanonForCausalLM, prompts: list[str]) -> list[str]:
    """Generate greedily with whole forwards of rows that are padded on the right."""
    encoded = [tokenizer().encode(prompt).ids for prompt in prompts]
    lengths = torch.tensor([len(ids) for ids in encoded])
    rows = torch.zeros(len(prompts), MAX_TOKENS, dtype=torch.int64)
    for row, ids in zip(rows, encoded, strict=True):
        row[: len(ids)] = torch.tensor(ids)
    starts, going = lengths.clone(), torch.arange(len(prompts))
    while going.numel():
        last = lengths[going]
        hidden = model(rows[going, : int(last.max())])
        token = model.compute_logits(hidden[torch.arange(len(going)), last - 1]).argmax(-1)
        rows[going, last] = token
        lengths[going] += 1
        going = going[(token != VOCABULARY.index(END)) & (last + 1 < MAX_TOKENS)]
    said = [row[start:stop].tolist() for row, start, stop in zip(rows, starts, lengths, strict=True)]
    return tokenizer().decode_batch(said)


@EVERY_TASK
def test_answers_follow_from_prompts(task):
    questions = some(task)
    assert all(question.task == task for question in questions)
    assert all(question.answer.split() == solve(question) for question in questions)
    assert len({question.answer for question in questions}) > 5


@EVERY_TASK
def test_only_the_whole_answer_is_right(task):
    for question in some(task, 50):
        words = question.answer.split()
        assert is_right(question, question.answer)
        assert is_right(question, f" {question.answer} {END}")
        assert not is_right(question, "")
        assert not is_right(question, " ".join(words[:-1]))
        assert not is_right(question, " ".join([*words, words[-1]]))
        for index in range(len(words)):
            assert not is_right(question, " ".join([*words[:index], "=", *words[index + 1 :]]))


@EVERY_TASK
def test_fraction_of_held_out_questions(task):
    share = sum(is_held_out(question) for question in some(task, 4000)) / 4000
    assert 0.03 < share < 0.1


def test_held_out_questions_differ_and_alternate_tasks():
    questions = held_out(90, seed=3)
    assert len({question.prompt for question in questions}) == 90
    assert [question.task for question in questions] == [TASKS[index % len(TASKS)] for index in range(90)]
    assert all(map(is_held_out, questions))
    assert questions == held_out(90, seed=3) != held_out(90, seed=4)


@EVERY_TASK
def test_one_task_of_held_out_questions(task):
    assert {question.task for question in held_out(20, task=task)} == {task}


def test_held_out_depends_only_on_the_prompt():
    for question in held_out(30):
        assert is_held_out(Question("any", question.prompt, "another answer"))


@EVERY_TASK
def test_the_tokenizer_knows_every_word(task):
    unknown = VOCABULARY.index(UNKNOWN)
    for question in some(task):
        ids = tokenizer().encode(question.prompt).ids
        answer = tokenizer().encode(f"{question.answer} {END}", add_special_tokens=False).ids
        assert unknown not in ids + answer
        assert len(ids) + len(answer) <= MAX_TOKENS
        assert tokenizer().decode(ids) == question.prompt
        assert is_right(question, tokenizer().decode(answer))


def test_the_tokenizer_has_the_vocabulary_and_a_start_token_in_front():
    assert [tokenizer().id_to_token(index) for index in range(tokenizer().get_vocab_size())] == list(VOCABULARY)
    assert tokenizer().encode("copy a never-seen =").tokens == ["<bos>", "copy", "a", "<unk>", "="]


def test_the_checkpoint_is_small():
    assert sum(file.stat().st_size for file in CHECKPOINT.iterdir()) < 5_000_000


def test_the_model_answers_held_out_questions():
    model = LlamaCanonForCausalLM.from_pretrained(CHECKPOINT)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    questions = held_out(150, seed=2)
    with torch.inference_mode():
        said = answer_greedily(model, [question.prompt for question in questions])
    wrong = [(q.prompt, text) for q, text in zip(questions, said, strict=True) if not is_right(q, text)]
    assert len(wrong) <= 1, wrong


def test_training_batches_contain_no_held_out_questions():
    """Decode rows of the training script from their ids."""
    train = pytest.importorskip("train", reason="the training script is not here")
    ids, labels = next(iter(train.TrainingBatches(rows=400, seed=0)))
    assert ids.shape == labels.shape == (400, MAX_TOKENS)
    for row, label in zip(ids, labels, strict=True):
        first = int((label != train.IGNORED).nonzero()[0])
        prompt = tokenizer().decode(row[: first + 1].tolist())
        answer = tokenizer().decode(label[label != train.IGNORED].tolist(), skip_special_tokens=False)
        task = prompt.split()[0].replace("mod", "calc")
        question = Question(task, prompt, answer.removesuffix(END).strip())
        assert not is_held_out(question)
        assert question.answer.split() == solve(question)
        assert answer.endswith(END)


def test_demo_is_the_bundled_model():
    """The checkpoint package defines the folder itself, since it cannot import `lamella.demo`."""
    assert find_folder(DEMO) == DEMO_FOLDER == CHECKPOINT and (CHECKPOINT / "config.json").is_file()
