"""Templates: instructions and conversations -> the text a model goes on from.

A prompt template has two forms, with an input and without one: a name in TEMPLATES, or a JSON file
{"prompt_input": "... {instruction} ... {input} ...", "prompt_no_input": "... {instruction} ..."}
as of mLoRA and Alpaca-LoRA, whose other keys are description and response_split.

A chat template is jinja2 and writes special tokens itself: `chat` stands for that of the
checkpoint (chat_template.jinja, else chat_template of tokenizer_config.json), or a .jinja file.
"""

import datetime
import json
import re
import string
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from mixlora.errors import InputError, did_you_mean
from mixlora.files import read_json, read_text
from mixlora.tokenizer import Tokenizer

WRONG_VALUES = (TypeError, ValueError, ArithmeticError, LookupError)  # what a template may raise
Message = dict[str, str]  # role: system, user or assistant; content: text


class Span(NamedTuple):
    """A piece of a text, and whether a model learns to write it."""

    text: str
    is_answer: bool


class PromptTemplate(NamedTuple):
    with_input: str
    without_input: str

    def prompt(self, instruction: str, input_text: str | None = None) -> str:
        template = self.with_input if input_text else self.without_input
        return template.format(instruction=instruction, input=input_text)


# alpaca: Stanford Alpaca's; moe_peft: MoE-PEFT's and mLoRA's default.
TEMPLATES = {
    "alpaca": PromptTemplate(
        "Below is an instruction that describes a task, paired with an input that provides "
        "further context. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n",
        "Below is an instruction that describes a task. Write a response that appropriately "
        "completes the request.\n\n### Instruction:\n{instruction}\n\n### Response:\n",
    ),
    "moe_peft": PromptTemplate(
        "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Output:\n",
        "### Instruction:\n{instruction}\n\n### Output:\n",
    ),
    "plain": PromptTemplate("{instruction}\n{input}\n", "{instruction}\n"),
}


def user_message(instruction: str, input_text: str | None = None) -> Message:
    content = f"{instruction}\n\n{input_text}" if input_text else instruction
    return {"role": "user", "content": content}


class ChatTemplate:
    """`source` is jinja2, rendered in a sandbox with what transformers gives to it."""

    def __init__(self, source: str, special_tokens: dict[str, str], where: str) -> None:
        self.special_tokens, self.where = special_tokens, where
        try:
            import jinja2
            from jinja2.sandbox import ImmutableSandboxedEnvironment
        except ImportError:
            raise InputError(f"{where}: a chat template takes: pip install jinja2") from None
        self._errors = (jinja2.TemplateError, RecursionError, *WRONG_VALUES)
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raiser(jinja2.TemplateError)
        environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
        try:
            self._template = environment.from_string(_without_generation_marks(source))
        except jinja2.TemplateError as error:
            raise InputError(f"{where}: not a chat template: {error}") from None

    def render(self, messages: list[Message], add_generation_prompt: bool = False) -> str:
        try:
            return self._template.render(
                messages=messages,
                tools=None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **self.special_tokens,
            )
        except self._errors as error:
            raise InputError(f"{self.where}: {error}") from None

    def prompt(self, instruction: str, input_text: str | None = None) -> str:
        return self.render([user_message(instruction, input_text)], add_generation_prompt=True)

    def spans(self, messages: list[Message]) -> list[Span]:
        """The conversation, cut where assistants begin to speak and where they have ended.

        An answer is what its message adds to the text of those before it and the generation
        prompt: its end token is part of it.
        """
        whole, spans, start = self.render(messages), [], 0
        for i, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before = self.render(messages[:i], add_generation_prompt=True)
            through = self.render(messages[: i + 1])
            if not (whole.startswith(through) and through.startswith(before)):
                raise InputError(
                    f"{self.where}: message {i} is not written alike alone and in the whole "
                    "conversation, so that its place in it is unknown"
                )
            spans += [Span(whole[start : len(before)], False), Span(through[len(before) :], True)]
            start = len(through)
        return [*spans, Span(whole[start:], False)] if start < len(whole) else spans


Template = PromptTemplate | ChatTemplate


def find_template(name: str, tokenizer: Tokenizer) -> Template:
    """A template by name, or of a JSON or .jinja file."""
    if name in TEMPLATES:
        return TEMPLATES[name]
    if name == "chat":
        return chat_template(tokenizer)
    path = Path(name)
    if path.suffix == ".jinja":
        return ChatTemplate(read_text(path), tokenizer.special_tokens, name)
    if path.suffix == ".json" or path.is_file():
        return read_template(path)
    hint = did_you_mean(name, [*TEMPLATES, "chat"])
    raise InputError(f"unknown template {name!r}{hint}; nor is it a .json or .jinja file")


def chat_template(tokenizer: Tokenizer) -> ChatTemplate:
    path = tokenizer.folder / "chat_template.jinja"
    if path.is_file():
        return ChatTemplate(read_text(path), tokenizer.special_tokens, str(path))
    path = tokenizer.folder / "tokenizer_config.json"
    source = tokenizer.settings.get("chat_template")
    if isinstance(source, list):  # several with names, of which "default" is meant
        named = {entry.get("name"): entry for entry in source if isinstance(entry, dict)}
        source = named.get("default", {}).get("template")
    if not isinstance(source, str):
        raise InputError(f"{path}: no chat_template, nor is there a chat_template.jinja beside it")
    return ChatTemplate(source, tokenizer.special_tokens, str(path))


def read_template(path: Path) -> PromptTemplate:
    """Its fields are names and nothing else: what {instruction.x} would reach is not a text."""
    content = read_json(path)
    keys = ("description", "prompt_input", "prompt_no_input", "response_split")
    for key in content:
        if key not in keys:
            raise InputError(f"{path}: unknown key {key!r}{did_you_mean(key, keys)}")
    forms = []
    for key, names in (("prompt_input", ("instruction", "input")), (keys[2], ("instruction",))):
        text = content.get(key)
        if not isinstance(text, str):
            raise InputError(f"{path}: {key} must be text, got {text!r}")
        try:
            fields = [part[1:] for part in string.Formatter().parse(text) if part[1] is not None]
        except ValueError as error:
            raise InputError(f"{path}: {key}: {error}") from None
        for name, form, conversion in fields:
            if name not in names or form or conversion:
                known = ", ".join(f"{{{name}}}" for name in names)
                raise InputError(f"{path}: {key} holds {{{name}}}, may hold {known}")
        forms.append(text)
    return PromptTemplate(*forms)


def _without_generation_marks(source: str) -> str:
    """{% generation %} ... {% endgeneration %} mark answers for other programs."""
    source = re.sub(r"\{%([-+]?)\s*generation\s*([-+]?)%\}", r"{%\1 if true \2%}", source)
    return re.sub(r"\{%([-+]?)\s*endgeneration\s*([-+]?)%\}", r"{%\1 endif \2%}", source)


def _raiser(error: type[Exception]) -> Callable[[str], NoReturn]:
    def raise_exception(message: str) -> NoReturn:
        raise error(message)

    return raise_exception


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """jinja2's own filter escapes HTML."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )
