"""A real model: its greedy text is the published one, to the character."""

import functools
from pathlib import Path

import pytest
from torch import nn

import generate
import models
from mixlora import engine
from mixlora.tokenizer import Tokenizer

BASE = Path(__file__).resolve().parents[2] / "shared/data/models/stories260K"
pytestmark = pytest.mark.skipif(not BASE.is_dir(), reason="../shared/data/models is not there")

NUM_STEPS = 256  # of the program that wrote the reference, the prompt's tokens included


@functools.cache
def base() -> tuple[nn.Module, Tokenizer]:
    return models.load(BASE), Tokenizer(BASE)


def reference() -> str:
    """The first block of the page that shows a command with `-t 0.0`, less the command."""
    page = (BASE / "reference_output.md").read_text(encoding="utf-8")
    block = next(block for block in page.split("```") if "-t 0.0\n" in block)
    return block.partition("-t 0.0\n")[2].removesuffix("\n")


@pytest.mark.parametrize("prompt", ["", pytest.param("Once upon a time", marks=pytest.mark.slow)])
def test_greedy_text(prompt: str) -> None:
    model, tokenizer = base()
    tokens = tokenizer.encode(prompt)
    (new,) = engine.generate(model, [tokens], NUM_STEPS + 1 - len(tokens))
    assert tokenizer.decode(tokens + new) == reference()


def test_greedy_text_in_a_batch() -> None:
    model, tokenizer = base()
    prompts = [tokenizer.encode(text) for text in ("", "Once upon a time, there was", "The")]
    new = engine.generate(model, prompts, NUM_STEPS)
    for prompt, tokens in list(zip(prompts, new, strict=True))[:2]:
        assert tokenizer.decode((prompt + tokens)[: NUM_STEPS + 1]) == reference()


@pytest.mark.parametrize("prompt", [pytest.param("", marks=pytest.mark.slow), "Once upon a time"])
def test_command(prompt: str, capsys) -> None:
    num_new = NUM_STEPS + 1 - len(base()[1].encode(prompt))
    arguments = ["--base", str(BASE), "--prompt", prompt, "--max-new-tokens", str(num_new)]
    assert generate.main([*arguments, "--device", "cpu"]) == 0
    captured = capsys.readouterr()
    assert captured.out == reference() + "\n"


def test_command_with_several_prompts(capsys) -> None:
    options = ["--prompt", "Once upon", "--prompt", "", "--max-new-tokens", "20"]
    assert generate.main(["--base", str(BASE), "--device", "cpu", *options]) == 0
    _, first, second = capsys.readouterr().out.split("--- ")
    for text, number in ((first, 1), (second, 2)):
        said = text.removeprefix(f"{number}\n").removesuffix("\n")
        assert len(said) > 20
        assert reference().startswith(said)
