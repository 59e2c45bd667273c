"""Questions for the demo model: one generator for its training, the command line and the tests.

A question is a prompt of words with a space between them, and its one right answer. Every task depends on exact tokens
all over the prompt, so an engine that loses, repeats or misplaces one shows it at once:

* `copy`: say the symbols again. `copy f 3 f x =` asks for `f 3 f x`. Up to 48 letters and digits, repeats allowed.
* `hop`: the arrows form one ring over up to 12 letters, in shuffled order; follow one to six of them and name every
  letter on the way. `hop b > c ; a > b ; d > a ; c > d ; from a go 3 =` asks for `b c d`.
* `calc`: one to three operations modulo 7, done strictly from left to right. `mod 7 start 3 plus 5 times 2 =` asks
  for `2`.

A hash of the prompt decides whether a question is held out; training skips those.
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
# Every token of the demo model; the index is the id.
VOCABULARY = (
    *(UNKNOWN, START, END, *SYMBOLS, *OPERATIONS),
    *("copy", "hop", "mod", "start", "from", "go", ">", ";", "="),
)

MAX_SYMBOLS = 48
MIN_NODES, MAX_NODES = 4, 12
MAX_HOPS = 6
MAX_OPERATIONS = 3
# The start token, a whole `copy` question (nothing is longer) and the end token.
MAX_TOKENS = 2 * MAX_SYMBOLS + 4


@dataclass(frozen=True)
class Question:
    """What to ask, and what the model should say before it ends its text."""

    task: str
    prompt: str
    answer: str


def make_question(task: str, rng: random.Random) -> Question:
    """A random question of one of `TASKS`, held out or not."""
    prompt, answer = _MAKERS[task](rng)
    return Question(task, " ".join(prompt), " ".join(answer))


def is_held_out(question: Question) -> bool:
    """Whether training never sees the question: one of sixteen, by its prompt."""
    return sha256(question.prompt.encode()).digest()[0] < 16


def held_out(count: int, seed: int = 0, task: str | None = None) -> list[Question]:
    """`count` different held-out questions, the same for the same arguments: of one task, or of all in turn."""
    rng = random.Random(seed)
    tasks = TASKS if task is None else (task,)
    questions: dict[Question, None] = {}
    while len(questions) < count:
        question = make_question(tasks[len(questions) % len(tasks)], rng)
        if is_held_out(question):
            questions[question] = None
    return list(questions)


def is_right(question: Question, text: str) -> bool:
    """Whether `text`, what a model said after the prompt, is the answer; one end token behind it may be there."""
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
