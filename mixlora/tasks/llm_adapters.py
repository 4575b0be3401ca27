"""Rows as LLM-Adapters (AGI-Edgerunners, arXiv 2304.01933) asks them: an instruction in Alpaca's
wrapper, to be answered by generation. Checked against all rows of its seven test files that are
public; of HellaSwag's, against a published log.
"""

import re

from mixlora.tasks import choice
from mixlora.tasks.choice import Example, text, texts
from mixlora.tasks.generation import Generation, Problem

INDENT = " " * 16  # its wrapper is an indented literal, and the indent is part of the prompt
WRAPPER = (
    "Below is an instruction that describes a task. Write a response that appropriately "
    f"completes the request. \n\n{INDENT}### Instruction:\n{INDENT}{{instruction}}\n\n"
    f"{INDENT}### Response:\n{INDENT}"
)


def arc(row: dict) -> Problem:
    return _answers(text(row, "question"), texts(row["choices"], "text"), choice.arc(row))


def obqa(row: dict) -> Problem:
    return _answers(text(row, "question_stem"), texts(row["choices"], "text"), choice.obqa(row))


def siqa(row: dict) -> Problem:
    options = [text(row, f"answer{letter}") for letter in "ABC"]
    question = f"{text(row, 'context')} {text(row, 'question')}"
    return _answers(question, options, choice.siqa(row))


def boolq(row: dict) -> Problem:
    example = choice.boolq(row)
    question = "Please answer the following question with true or false, question: "
    question += f"{text(row, 'question')}?\n\nAnswer format: true/false"
    return _problem(question, example.labels, example.right)


def piqa(row: dict) -> Problem:
    return _problem(
        f"Please choose the correct solution to the question: {text(row, 'goal')}\n\n"
        f"Solution1: {text(row, 'sol1')}\n\nSolution2: {text(row, 'sol2')}\n\n"
        "Answer format: solution1/solution2",
        _names("solution", 2),
        f"solution{choice.piqa(row).gold + 1}",
    )


def hellaswag(row: dict) -> Problem:
    endings = texts(row, "endings")
    return _problem(
        "Please choose the correct ending to complete the given sentence: "
        f"{text(row, 'activity_label')}: {text(row, 'ctx')}\n\n{_listed('Ending', endings)}\n\n"
        f"Answer format: {'/'.join(_names('ending', len(endings)))}",
        _names("ending", 4),
        f"ending{choice.hellaswag(row).gold + 1}",
    )


def winogrande(row: dict) -> Problem:
    return _problem(
        "Please choose the correct answer to fill in the blank to complete the given sentence: "
        f"{text(row, 'sentence')}\n\nOption1: {text(row, 'option1')} "
        f"Option2: {text(row, 'option2')} Answer format: option1/option2",
        _names("option", 2),
        f"option{choice.winogrande(row).gold + 1}",
    )


def first_match(text: str, labels: tuple[str, ...]) -> str | None:
    """Anywhere in the text, inside a word too; a label more than the row has is found as well."""
    match = re.search("|".join(labels), text)
    return match[0] if match else None


# The published code reads up to "### Response:", should the model write that again.
GENERATION = Generation(32, ("### Response:",), first_match)


def _answers(question: str, options: list[str], example: Example) -> Problem:
    return _problem(
        f"Please choose the correct answer to the question: {question}\n\n"
        f"{_listed('Answer', options)}\n\n"
        f"Answer format: {'/'.join(_names('answer', len(options)))}",
        _names("answer", 5),
        f"answer{example.gold + 1}",
    )


def _problem(instruction: str, labels: tuple[str, ...], right: str) -> Problem:
    prompt = WRAPPER.format(instruction=instruction)
    return Problem(prompt, labels, right, f"the correct answer is {right}", GENERATION)


def _listed(word: str, options: list[str]) -> str:
    return " ".join(f"{word}{i}: {option}" for i, option in enumerate(options, 1))


def _names(word: str, count: int) -> tuple[str, ...]:
    return tuple(f"{word}{i}" for i in range(1, count + 1))
