"""Tour of the demo model: its answers, and a check that all paths through the engine give the same tokens."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from lamella.demo.questions import MAX_TOKENS, TASKS, Question, held_out, is_right
from lamella.engine.requests.sampling_params import SamplingParams
from lamella.serve.llm import LLM

REQUIRED_ACCURACY = 0.99
# The smallest budget divides prompts at every offset of a convolution window; the largest computes prompts whole.
CHUNK_BUDGETS = (3, 16, 64, 2048)

_PARAMS = SamplingParams(temperature=0, max_tokens=MAX_TOKENS)


@dataclass(frozen=True)
class Answer:
    """Answer of the model to a question.

    Attributes:
        question: the question.
        text: generated text.
        token_ids: generated tokens.
        prompt_token_ids: tokens of the prompt.
        right: True if the answer is right.
    """

    question: Question
    text: str
    token_ids: tuple[int, ...]
    prompt_token_ids: tuple[int, ...]
    right: bool

    def as_dict(self) -> dict[str, Any]:
        """Return the answer for JSON."""
        return {**asdict(self.question), "said": self.text, "right": self.right}


@dataclass(frozen=True)
class TourResult:
    """Accuracy of the demo model, and agreement of all paths.

    Attributes:
        questions: number of questions.
        accuracy: fraction of right answers for each chunk budget.
        by_task: fraction of right answers for each task, with whole prompts.
        same_tokens: for each chunk budget, True if all tokens equal those of whole prompts.
        plain_agrees: fraction of tokens that a plain forward without the engine gives, too.
    """

    questions: int
    accuracy: dict[int, float]
    by_task: dict[str, float]
    same_tokens: dict[int, bool]
    plain_agrees: float

    @property
    def passed(self) -> bool:
        """True if all checks passed."""
        return (
            min(self.accuracy.values()) >= REQUIRED_ACCURACY
            and all(self.same_tokens.values())
            and self.plain_agrees == 1
        )


def answer_questions(llm: LLM, questions: Sequence[Question], use_tqdm: bool = False) -> list[Answer]:
    """Generate greedy answers to questions."""
    outputs = llm.generate([question.prompt for question in questions], _PARAMS, use_tqdm=use_tqdm)
    return [
        Answer(
            question=question,
            text=output.outputs[0].text,
            token_ids=tuple(output.outputs[0].token_ids),
            prompt_token_ids=tuple(output.prompt_token_ids),
            right=is_right(question, output.outputs[0].text),
        )
        for question, output in zip(questions, outputs, strict=True)
    ]


def show_answers(console: Console, answers: Sequence[Answer]) -> None:
    """Print each question with the model's answer, and the right answer if it is wrong."""
    for answer in answers:
        console.print(f"{answer.question.task}: {answer.question.prompt}", markup=False)
        verdict = "[green]right[/green]" if answer.right else f"[red]wrong[/red], it is {answer.question.answer}"
        console.print(f"   {answer.text.strip()}   {verdict}")


def plain_agreement(llm: LLM, answers: Sequence[Answer]) -> float:
    """Return the fraction of generated tokens that one plain forward over prompt and answer gives, too."""
    model, agreed, total = llm.engine.model, 0, 0
    for answer in answers:
        ids = torch.tensor(answer.prompt_token_ids + answer.token_ids, device=llm.engine.device)
        with torch.no_grad():
            hidden = model(ids)[len(answer.prompt_token_ids) - 1 : -1]
            chosen = model.compute_logits(hidden).argmax(-1).tolist()
        agreed += sum(mine == theirs for mine, theirs in zip(chosen, answer.token_ids, strict=True))
        total += len(answer.token_ids)
    return agreed / total


def take_tour(count: int) -> tuple[TourResult, list[Answer]]:
    """Answer `count` held-out questions with every chunk budget.

    Returns:
        The result, and the answers to whole prompts.
    """
    questions = held_out(count)
    answers: dict[int, list[Answer]] = {}
    for budget in CHUNK_BUDGETS:
        llm = LLM("demo", max_num_batched_tokens=budget, max_num_seqs=64)
        answers[budget] = answer_questions(llm, questions)
    whole = answers[max(CHUNK_BUDGETS)]
    asked = Counter(answer.question.task for answer in whole)
    right = Counter(answer.question.task for answer in whole if answer.right)
    result = TourResult(
        questions=count,
        accuracy={budget: sum(a.right for a in some) / count for budget, some in answers.items()},
        by_task={task: right[task] / asked[task] for task in TASKS if asked[task]},
        same_tokens={
            budget: [a.token_ids for a in some] == [a.token_ids for a in whole] for budget, some in answers.items()
        },
        plain_agrees=plain_agreement(llm, whole),
    )
    return result, whole


def show_result(console: Console, result: TourResult) -> None:
    """Print the result of the tour."""
    table = Table("chunk budget of prompts", "right", "same tokens", title=f"{result.questions} held-out questions")
    for budget, accuracy in result.accuracy.items():
        table.add_row(
            f"{budget} tokens per step", f"{accuracy:.1%}", "yes" if result.same_tokens[budget] else "[red]no[/red]"
        )
    console.print(table)
    console.print("by task: " + ", ".join(f"{task} {fraction:.1%}" for task, fraction in result.by_task.items()))
    console.print(f"tokens that a plain forward without engine, blocks or chunks gives, too: {result.plain_agrees:.2%}")
    verdict = "[green]all checks passed[/green]" if result.passed else "[red]a check failed[/red]"
    console.print(verdict)
