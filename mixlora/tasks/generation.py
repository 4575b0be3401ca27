"""Tasks that are answered by generation: the answer is read in the text that follows the prompt.

GSM8K and AQuA are asked in one form, and training ends the text with the answer in a fixed one:

    Question: {question}\\nAnswer: {steps}\\n#### 18
    Question: {question}\\nOptions: (A) 4 (B) 5\\nAnswer: {rationale}\\nThe answer is B.
"""

import re
from collections.abc import Callable
from decimal import Decimal
from typing import NamedTuple

from mixlora.tasks.choice import LETTERS, text, texts

FindAnswer = Callable[[str, tuple[str, ...]], str | None]


class Generation(NamedTuple):
    """How an answer is generated and read: `read(text, labels)` is None where it finds none."""

    max_new_tokens: int
    stop: tuple[str, ...]  # the text ends before the first of these
    read: FindAnswer
    read_strictly: FindAnswer | None = None  # only where the answer stands in the form of training


class Problem(NamedTuple):
    prompt: str
    labels: tuple[str, ...]  # what may be answered; () = any number
    right: str  # what `generation.read` must find
    answer: str  # what follows the prompt in training
    generation: Generation


def gsm8k(row: dict) -> Problem:
    question, answer = text(row, "question"), text(row, "answer")
    right = final_number(answer)
    if right is None or not re.search(r"#### \S+\s*$", answer):
        raise ValueError("answer must end in '#### ' and a number")
    return Problem(f"Question: {question}\nAnswer:", (), right, f" {answer.rstrip()}", NUMBER)


def aqua(row: dict) -> Problem:
    """The dataset writes an option as "A)32400"."""
    question, options, correct = text(row, "question"), texts(row, "options"), text(row, "correct")
    labels = tuple(LETTERS[: len(options)])
    if correct not in labels:
        raise ValueError(f"correct must be one of {', '.join(labels)}, got {correct!r}")
    for label, option in zip(labels, options, strict=False):
        if not option.startswith(f"{label})"):
            raise ValueError(f"options must begin with A), B), ... in turn, got {option!r}")
    options = " ".join(f"({option[0]}) {option[2:].strip()}" for option in options)
    answer = f" {text(row, 'rationale').strip()}\nThe answer is {correct}."
    return Problem(
        f"Question: {question}\nOptions: {options}\nAnswer:", labels, correct, answer, LETTER
    )


# A minus sign stands at the beginning or after a space, a bracket, ...; else it subtracts.
DIGITS = r"(?:(?<![\w.)])-)?\$?(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)(?:\.[0-9]+)?"


def last_number(text: str, labels: tuple[str, ...] = ()) -> str | None:
    numbers = re.findall(DIGITS, text)
    return _plain(numbers[-1]) if numbers else None


def final_number(text: str, labels: tuple[str, ...] = ()) -> str | None:
    """The number after the first "####"."""
    number = re.search(rf"####\s*({DIGITS})", text)
    return _plain(number[1]) if number else None


def last_letter(text: str, labels: tuple[str, ...]) -> str | None:
    """The last label that stands alone; after "The answer is" where that is there."""
    alone = re.findall(rf"(?<![\w'])[{''.join(labels)}](?![\w'])", text)
    return final_letter(text, labels) or (alone[-1] if alone else None)


def final_letter(text: str, labels: tuple[str, ...]) -> str | None:
    letter = re.search(rf"[Tt]he answer is \(?([{''.join(labels)}])(?![\w'])", text)
    return letter[1] if letter else None


def _plain(number: str) -> str:
    """ "$1,200.50" -> "1200.5", "18.00" -> "18"."""
    return f"{Decimal(re.sub('[$,]', '', number)).normalize() + 0:f}"


# No answer of GSM8K has more than 429 tokens of LLaMA-2, none of the AQuA rows tried more than 347.
NUMBER = Generation(448, ("Question:",), last_number, final_number)
LETTER = Generation(384, ("Question:",), last_letter, final_letter)
