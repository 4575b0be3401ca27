"""Multiple-choice tasks: rows of the original datasets -> MixLoRA's prompts (MoE-PEFT, TUDB-Labs).

A prompt ends where the answer begins; the answer is " " + label. A row's labels are its own.
"""

from typing import NamedTuple

LETTERS = "ABCDEFGH"


class Example(NamedTuple):
    prompt: str
    labels: tuple[str, ...]
    gold: int  # index into labels

    @property
    def right(self) -> str:
        return self.labels[self.gold]

    @property
    def answer(self) -> str:
        """What follows the prompt in training."""
        return " " + self.right


def arc(row: dict) -> Example:
    """Also of CommonsenseQA, whose rows have the same columns."""
    return _question(text(row, "question"), row["choices"], row["answerKey"])


def obqa(row: dict) -> Example:
    return _question(text(row, "question_stem"), row["choices"], row["answerKey"])


def boolq(row: dict) -> Example:
    """Without the passage, as in MixLoRA's evaluation."""
    question = "Please answer the following question with true or false: "
    question += f"{text(row, 'question')}?"
    if not isinstance(row["answer"], bool):
        raise ValueError(f"answer must be true or false, got {row['answer']!r}")
    return Example(f"{question}\nAnswer:", ("true", "false"), 0 if row["answer"] else 1)


def piqa(row: dict) -> Example:
    prompt = (
        "Below is a common task along with two possible solutions labeled (A) and (B). "
        f"Please select the appropriate solution to achieve the task:\n{text(row, 'goal')}\n\n"
        f"(A) {text(row, 'sol1')}\n(B) {text(row, 'sol2')}\n\nCorrect solution:"
    )
    return _lettered(prompt, 2, _number(row, "label"))


def siqa(row: dict) -> Example:
    answers = [text(row, key) for key in ("answerA", "answerB", "answerC")]
    prompt = (
        f"Please choose the correct answer to the question.\n"
        f"Question: {text(row, 'context')} {text(row, 'question')}\n{_options(answers)}\nAnswer:"
    )
    return _lettered(prompt, 3, _number(row, "label") - 1)


def hellaswag(row: dict) -> Example:
    endings = texts(row, "endings")
    prompt = (
        "Please choose the correct ending to complete the given sentence.\n"
        f"Sentence: {text(row, 'activity_label')}. {text(row, 'ctx')}\n"
        f"{_options(endings)}\nAnswer:"
    )
    return _lettered(prompt, len(endings), _number(row, "label"))


def winogrande(row: dict) -> Example:
    prompt = (
        "Please choose the correct answer to fill in the blank to complete the given sentence.\n"
        f"Sentence: {text(row, 'sentence')}\n"
        f"{_options([text(row, 'option1'), text(row, 'option2')])}\nAnswer:"
    )
    return _lettered(prompt, 2, _number(row, "answer") - 1)


def pubmedqa(row: dict) -> Example:
    return _pubmedqa(row, "")


def pubmedqa_training(row: dict) -> Example:
    """In training the published text shows the long answer before the short one."""
    return _pubmedqa(row, f"Long Answer:\n{text(row, 'long_answer')}\n")


def text(row: dict, key: str) -> str:
    if not isinstance(row[key], str):
        raise ValueError(f"{key} must be text, got {row[key]!r}")
    return row[key]


def texts(row: dict, key: str) -> list[str]:
    if not isinstance(row[key], list) or not all(isinstance(item, str) for item in row[key]):
        raise ValueError(f"{key} must be a list of texts, got {row[key]!r}")
    return row[key]


def _pubmedqa(row: dict, long_answer: str) -> Example:
    context = row["context"]
    if not isinstance(context, dict):
        raise ValueError(f"context must hold labels and contexts, got {context!r}")
    labels, passages = texts(context, "labels"), texts(context, "contexts")
    if len(labels) != len(passages):
        raise ValueError(f"context has {len(labels)} labels for {len(passages)} contexts")
    passages = "".join(f"({x}) {passage}\n" for x, passage in zip(labels, passages, strict=True))
    answers = ("yes", "no", "maybe")
    if row["final_decision"] not in answers:
        wanted = ", ".join(answers)
        raise ValueError(f"final_decision must be one of {wanted}, got {row['final_decision']!r}")
    prompt = (
        "Instruction:\nPlease answer the following question with yes or no based on your medical "
        f"knowledge and the following context.\nQuestion:\n{text(row, 'question')}\n"
        f"Context:\n{passages}{long_answer}Answer:"
    )
    return Example(prompt, answers, answers.index(row["final_decision"]))


def _number(row: dict, key: str) -> int:
    """Datasets write a label as 1 or as "1"; the labels that a test split hides are "" or -1."""
    if not str(row[key]).isdecimal():
        raise ValueError(f"{key} must be a whole number, got {row[key]!r}")
    return int(row[key])


def _question(question: str, choices: dict, answer: str) -> Example:
    if not isinstance(choices, dict):
        raise ValueError(f"choices must hold label and text, got {choices!r}")
    labels, options = texts(choices, "label"), texts(choices, "text")
    if len(labels) != len(options) or len(set(labels)) < len(labels) or "" in labels:
        raise ValueError(f"choices must have a label of its own for each text, got {choices!r}")
    options = "".join(f" ({x}) {option}" for x, option in zip(labels, options, strict=True))
    prompt = f"Please choose the correct answer to the question: {question}{options}\nAnswer:"
    if answer not in labels:
        raise ValueError(f"answerKey must be one of {', '.join(labels)}, got {answer!r}")
    return Example(prompt, tuple(labels), labels.index(answer))


def _options(options: list[str]) -> str:
    return "\n".join(f"({x}) {option}" for x, option in zip(LETTERS, options, strict=False))


def _lettered(prompt: str, count: int, gold: int) -> Example:
    if count > len(LETTERS):
        raise ValueError(f"at most {len(LETTERS)} options have a letter, got {count}")
    if not 0 <= gold < count:
        raise ValueError(f"the label must point at one of {count} options, got option {gold + 1}")
    return Example(prompt, tuple(LETTERS[:count]), gold)
