"""Generator of questions for the demo model, used in its training, on the command line and in tests.

A question is a prompt of words separated by spaces, with exactly one right answer. Every task depends on exact tokens
in the whole prompt, so an engine that loses, repeats or misplaces a token gives wrong answers:

* `copy`: repeat the symbols. `copy f 3 f x =` has the answer `f 3 f x`. Up to 48 letters and digits.
* `hop`: the arrows form one ring over up to 12 letters, in shuffled order. Follow one to six of them, and list the
  letters. `hop b > c ; a > b ; d > a ; c > d ; from a go 3 =` has the answer `b c d`.
* `calc`: one to three operations modulo 7, from left to right. `mod 7 start 3 plus 5 times 2 =` has the answer `2`.

A hash of the prompt decides whether a question is held out. Training skips held-out questions.
"""

from __future__ import annotations

import random
import string
from collections.abc import Callable
from dataclasses import dataclass
from hashlib import sha256

UNKNOWN, START, END = "<unk>", "<bos>", "<eos>"
LETTERS = tuple(string.ascii_lowercase)
SYMBOLS = (*LETTERS, *string.digits)
OPERATIONS: dict[str, Callable[[int, int], int]] = {
    "plus": lambda a, b: (a + b) % 7,
    "minus": lambda a, b: (a - b) % 7,
    "times": lambda a, b: (a * b) % 7,
}
# All tokens of the demo model, in order of their ids.
VOCABULARY = (
    *(UNKNOWN, START, END, *SYMBOLS, *OPERATIONS),
    *("copy", "hop", "mod", "start", "from", "go", ">", ";", "="),
)

MAX_SYMBOLS = 48
MIN_NODES, MAX_NODES = 4, 12
MAX_HOPS = 6
MAX_OPERATIONS = 3
# Start token, the longest `copy` question with its answer (the longest of all tasks), and end token.
MAX_TOKENS = 2 * MAX_SYMBOLS + 4


@dataclass(frozen=True)
class Question:
    """Prompt and right answer.

    Attributes:
        task: one of `TASKS`.
        prompt: words separated by spaces.
        answer: words that the model should generate before the end token.
    """

    task: str
    prompt: str
    answer: str


def make_question(task: str, rng: random.Random) -> Question:
    """Return a random question of one of `TASKS`, which may be held out."""
    prompt, answer = _MAKERS[task](rng)
    return Question(task, " ".join(prompt), " ".join(answer))


def is_held_out(question: Question) -> bool:
    """Return True for questions that training skips: one of sixteen, by a hash of the prompt."""
    return sha256(question.prompt.encode()).digest()[0] < 16


def held_out(count: int, seed: int = 0, task: str | None = None) -> list[Question]:
    """Return different held-out questions, always equal for equal arguments.

    Args:
        count: number of questions.
        seed: of the generator.
        task: one of `TASKS`; None: all tasks in turn.
    """
    rng = random.Random(seed)
    tasks = TASKS if task is None else (task,)
    questions: dict[Question, None] = {}
    while len(questions) < count:
        question = make_question(tasks[len(questions) % len(tasks)], rng)
        if is_held_out(question):
            questions[question] = None
    return list(questions)


def is_right(question: Question, text: str) -> bool:
    """Return True if a generated text is the right answer, with or without an end token."""
    words = text.split()
    return (words[:-1] if words[-1:] == [END] else words) == question.answer.split()


def _copy(rng: random.Random) -> tuple[list[str], list[str]]:
    symbols = rng.choices(SYMBOLS, k=rng.randint(1, MAX_SYMBOLS))
    return ["copy", *symbols, "="], symbols


def _hop(rng: random.Random) -> tuple[list[str], list[str]]:
    ring = rng.sample(LETTERS, rng.randint(MIN_NODES, MAX_NODES))
    start, hops = rng.randrange(len(ring)), rng.randint(1, MAX_HOPS)
    prompt = ["hop"]
    for index in rng.sample(range(len(ring)), len(ring)):
        prompt += [ring[index - 1], ">", ring[index], ";"]
    way = [ring[(start + hop) % len(ring)] for hop in range(1, hops + 1)]
    return [*prompt, "from", ring[start], "go", str(hops), "="], way


def _calc(rng: random.Random) -> tuple[list[str], list[str]]:
    value = rng.randrange(7)
    prompt = ["mod", "7", "start", str(value)]
    for _ in range(rng.randint(1, MAX_OPERATIONS)):
        word, operand = rng.choice(tuple(OPERATIONS)), rng.randrange(7)
        value = OPERATIONS[word](value, operand)
        prompt += [word, str(operand)]
    return [*prompt, "="], [str(value)]


_MAKERS = {"copy": _copy, "hop": _hop, "calc": _calc}
TASKS = tuple(_MAKERS)
