"""Multiple-choice tasks: rows of the original datasets -> MixLoRA's prompts (MoE-PEFT, TUDB-Labs).

A prompt ends where the answer begins; the answer is " " + label. A row's labels are its own.
"""

from typing import NamedTuple


class Example(NamedTuple):
    prompt: str
    labels: tuple[str, ...]
    gold: int  # index into labels


def arc(row: dict) -> Example:
    return _question(row["question"], row["choices"], row["answerKey"])


def obqa(row: dict) -> Example:
    return _question(row["question_stem"], row["choices"], row["answerKey"])


def boolq(row: dict) -> Example:
    """Without the passage, as in MixLoRA's evaluation."""
    question = f"Please answer the following question with true or false: {row['question']}?"
    if not isinstance(row["answer"], bool):
        raise ValueError(f"answer must be true or false, got {row['answer']!r}")
    return Example(f"{question}\nAnswer:", ("true", "false"), 0 if row["answer"] else 1)


def piqa(row: dict) -> Example:
    prompt = (
        "Below is a common task along with two possible solutions labeled (A) and (B). "
        f"Please select the appropriate solution to achieve the task:\n{row['goal']}\n\n"
        f"(A) {row['sol1']}\n(B) {row['sol2']}\n\nCorrect solution:"
    )
    return _lettered(prompt, 2, int(row["label"]))


def siqa(row: dict) -> Example:
    answers = row["answerA"], row["answerB"], row["answerC"]
    prompt = (
        f"Please choose the correct answer to the question.\n"
        f"Question: {row['context']} {row['question']}\n{_options(answers)}\nAnswer:"
    )
    return _lettered(prompt, 3, int(row["label"]) - 1)


def hellaswag(row: dict) -> Example:
    prompt = (
        "Please choose the correct ending to complete the given sentence.\n"
        f"Sentence: {row['activity_label']}. {row['ctx']}\n{_options(row['endings'])}\nAnswer:"
    )
    return _lettered(prompt, len(row["endings"]), int(row["label"]))


def winogrande(row: dict) -> Example:
    prompt = (
        "Please choose the correct answer to fill in the blank to complete the given sentence.\n"
        f"Sentence: {row['sentence']}\n{_options((row['option1'], row['option2']))}\nAnswer:"
    )
    return _lettered(prompt, 2, int(row["answer"]) - 1)


def _question(question: str, choices: dict, answer: str) -> Example:
    labels, texts = choices["label"], choices["text"]
    options = "".join(f" ({x}) {text}" for x, text in zip(labels, texts, strict=True))
    prompt = f"Please choose the correct answer to the question: {question}{options}\nAnswer:"
    if answer not in labels:
        raise ValueError(f"answerKey must be one of {', '.join(labels)}, got {answer!r}")
    return Example(prompt, tuple(labels), labels.index(answer))


def _options(texts: tuple[str, ...] | list[str]) -> str:
    return "\n".join(f"({x}) {text}" for x, text in zip("ABCDEFGH", texts, strict=False))


def _lettered(prompt: str, count: int, gold: int) -> Example:
    if not 0 <= gold < count:
        raise ValueError(f"the label must point at one of {count} options, got option {gold + 1}")
    return Example(prompt, tuple("ABCDEFGH"[:count]), gold)
