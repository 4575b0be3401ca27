"""Files of one's own -> the texts that a model is trained on.

    alpaca    rows {"instruction", "input" (or none), "output"}: a template's prompt and the output
    chat      rows {"messages": [{"role": "user", "content": "..."}, ...]}: a chat template's text
    sharegpt  rows {"conversations": [{"from": "human", "value": "..."}, ...]}: the same
    text      whole documents: rows {"text"}, or a file that is one

Rows are JSON lines or a JSON array. A conversation is an optional system message, then user and
assistant in turns; every answer is learned, what follows the last one is left out.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

from mixlora.errors import InputError, did_you_mean
from mixlora.files import read_rows, read_text
from mixlora.templates import ChatTemplate, Message, Span, Template, find_template, user_message
from mixlora.tokenizer import Tokenizer

ROLES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
}
DEFAULT_TEMPLATES = {"alpaca": "alpaca", "chat": "chat", "sharegpt": "chat"}


@dataclass
class Columns:
    """What a row of the format alpaca calls its parts."""

    instruction: str = "instruction"
    input: str = "input"
    output: str = "output"


@dataclass
class Source:
    path: str
    format: Literal["auto", "alpaca", "sharegpt", "chat", "text"] = "auto"
    template: str | None = None  # None: alpaca for instructions, the checkpoint's for chats
    columns: Columns = field(default_factory=Columns)
    weight: float = 1.0  # an epoch draws round(weight * samples) of its samples
    max_samples: int | None = None  # rows, from the beginning; None = all

    def __post_init__(self) -> None:
        if self.weight <= 0:
            raise InputError(f"weight must be > 0, got {self.weight}")
        if self.max_samples is not None and self.max_samples < 1:
            raise InputError(f"max_samples must be >= 1, got {self.max_samples}")


class Text(NamedTuple):
    """A text to train on, in pieces."""

    spans: list[Span]
    adds_special_tokens: bool = True  # BOS and EOS; a chat template has written its own
    is_document: bool = False  # cut into as many sequences as it takes


def load_source(source: Source, tokenizer: Tokenizer) -> list[Text]:
    """All texts of a file; each fault names the file and the line."""
    suffix = Path(source.path).suffix
    if (source.format == "text" and suffix not in (".json", ".jsonl")) or (
        source.format == "auto" and suffix == ".txt"
    ):
        return _whole_file(source)
    texts: list[Text] = []
    read = None
    for where, row in read_rows(source.path):
        if len(texts) == source.max_samples:
            break
        read = read or _reader(source, row, where, tokenizer)
        try:
            text = read(row)
            "".join(span.text for span in text.spans).encode()
        except InputError as error:
            raise InputError(f"{where}: {error}") from None
        except UnicodeEncodeError as error:
            raise InputError(f"{where}: half a surrogate pair is no text: {error}") from None
        texts.append(text)
    if not texts:
        raise InputError(f"{source.path} is empty")
    return texts


def _whole_file(source: Source) -> list[Text]:
    _refuse_template(source)
    text = read_text(source.path)
    if not text.strip():
        raise InputError(f"{source.path} is empty")
    return [Text([Span(text, True)], is_document=True)]


def _reader(source: Source, row: dict, where: str, tokenizer: Tokenizer) -> Callable[[dict], Text]:
    """How to read the rows of a source whose first row is this."""
    keys = {"chat": "messages", "sharegpt": "conversations"}
    keys |= {"alpaca": source.columns.instruction, "text": "text"}  # Alpaca's rows have a text too
    form = source.format
    if form == "auto":
        form = next((form for form, key in keys.items() if key in row), "auto")
    if form == "auto":
        raise InputError(
            f"{where}: format auto looks for one of {', '.join(keys.values())}, the row has "
            f"{', '.join(row) or 'nothing'}"
        )
    if form == "text":
        _refuse_template(source)
        return lambda row: Text([Span(_text(row, "text"), True)], is_document=True)
    template = find_template(source.template or DEFAULT_TEMPLATES[form], tokenizer)
    if form == "alpaca":
        return lambda row: _instruction(row, source.columns, template)
    if not isinstance(template, ChatTemplate):
        raise InputError(
            f"{source.path}: format {form} takes template chat or a .jinja file, got "
            f"{source.template!r}"
        )
    entry = ("role", "content") if form == "chat" else ("from", "value")
    return lambda row: _conversation(row, keys[form], entry, template)


def _refuse_template(source: Source) -> None:
    if source.template:
        raise InputError(f"{source.path}: template must be left out for format text")


def _instruction(row: dict, columns: Columns, template: Template) -> Text:
    instruction, output = _text(row, columns.instruction), _text(row, columns.output)
    is_missing = columns.input not in row and columns.input != Columns.input
    has_input = is_missing or row.get(columns.input) is not None
    input_text = _text(row, columns.input) if has_input else None
    if isinstance(template, ChatTemplate):
        answer = {"role": "assistant", "content": output}
        spans = template.spans([user_message(instruction, input_text), answer])
        return Text(spans, adds_special_tokens=False)
    return Text([Span(template.prompt(instruction, input_text), False), Span(output, True)])


def _conversation(row: dict, key: str, entry: tuple[str, str], template: ChatTemplate) -> Text:
    messages = [*_messages(row, key, entry)]
    answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    kept = messages[: answers[-1] + 1] if answers else messages
    return Text(template.spans(kept), adds_special_tokens=False)


def _messages(row: dict, key: str, entry: tuple[str, str]) -> Iterator[Message]:
    if key not in row:
        raise InputError(f"the row has no key {key!r}{did_you_mean(key, row)}")
    if not isinstance(row[key], list) or not row[key]:
        raise InputError(f"{key} must be a list of messages, got {row[key]!r:.60}")
    before = None
    for i, message in enumerate(row[key]):
        place = f"{key}.{i}"
        if not isinstance(message, dict):
            raise InputError(f"{place} must be an object, got {type(message).__name__}")
        said = _text(message, entry[0], f"{place}.")
        role = ROLES.get(said)
        if role is None:
            raise InputError(
                f"{place}.{entry[0]}: unknown role {said!r}{did_you_mean(said, ROLES)}"
            )
        wanted = {None: ("system", "user"), "user": ("assistant",)}.get(before, ("user",))
        if role not in wanted:
            raise InputError(
                f"{place}.{entry[0]} must be {' or '.join(wanted)} "
                f"{f'after {before}' if before else 'at the beginning'}, got {said!r}"
            )
        yield {"role": role, "content": _text(message, entry[1], f"{place}.")}
        before = role


def _text(row: dict, key: str, place: str = "") -> str:
    if key not in row:
        raise InputError(f"the row has no key '{place}{key}'{did_you_mean(key, row)}")
    if not isinstance(row[key], str):
        raise InputError(f"{place}{key} must be text, got {row[key]!r:.60}")
    return row[key]
