"""Text from a model, with or without an adapter.

python generate.py --base DIR [--adapter DIR] --prompt TEXT [--prompt TEXT ...]
                   | --instruction TEXT [--input TEXT] [--template alpaca|chat|FILE]
                   [--max-new-tokens N] [--temperature T] [--top-p P] [--seed S]
"""

import sys

import torch

import mixlora
import models
from mixlora.engine import Sampling, generate
from mixlora.errors import ArgumentParser, InputError, command
from mixlora.layers.quantized import KINDS
from mixlora.templates import TEMPLATES, ChatTemplate, find_template
from mixlora.tokenizer import Tokenizer


@command
def main(argv: list[str]) -> int:
    parser = ArgumentParser(description="Text from a model, with or without an adapter.")
    parser.add_argument("--base", required=True, help="checkpoint folder of the base model")
    parser.add_argument("--adapter", help="adapter folder; without it the base model speaks")
    parser.add_argument("--prompt", action="append", default=[], help="may be given several times")
    parser.add_argument("--instruction", help="goes into the template, instead of --prompt")
    parser.add_argument("--input", help="what the instruction is about")
    parser.add_argument(
        "--template",
        default="alpaca",
        help=f"{', '.join(TEMPLATES)}, chat (the checkpoint's own), or a .json or .jinja file",
    )
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--temperature", type=float, default=0.0, help="0 = greedy (default)")
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--quantize", choices=("none", *KINDS), default="none")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args(argv)
    if bool(options.prompt) == bool(options.instruction):
        raise InputError("give either --prompt or --instruction")
    sampling = Sampling(options.temperature, options.top_p, options.seed)

    dtype = getattr(torch, options.dtype)
    model = models.load(options.base, dtype, options.device, options.quantize)
    tokenizer = Tokenizer(model.folder, model.config.vocab_size)
    prompts = [tokenizer.encode(text) for text in options.prompt]
    if options.instruction:
        template = find_template(options.template, tokenizer)
        text = template.prompt(options.instruction, options.input)
        prompts = [tokenizer.encode(text, bos=not isinstance(template, ChatTemplate))]
    if options.adapter:
        mixlora.load_adapter(model, options.adapter)
    speaker = Speaker(tokenizer, prompts)
    stop = [id for id in (*tokenizer.stop_ids, tokenizer.bos_id) if id is not None]
    generate(model, prompts, options.max_new_tokens, sampling, stop, speaker.hear)
    speaker.finish()
    return 0


class Speaker:
    """Prints a single prompt's text as it comes, several prompts' one after the other."""

    def __init__(self, tokenizer: Tokenizer, prompts: list[list[int]]) -> None:
        self.tokenizer, self.tokens = tokenizer, [list(prompt) for prompt in prompts]
        self.said = 0  # characters

    def hear(self, row: int, token: int) -> None:
        self.tokens[row].append(token)
        if len(self.tokens) == 1:
            self.say()

    def say(self) -> None:
        text = self.tokenizer.decode(self.tokens[0])
        if not text.endswith("\ufffd"):  # half a character: wait for the rest
            print(text[self.said :], end="", flush=True)
            self.said = len(text)

    def finish(self) -> None:
        if len(self.tokens) == 1:
            self.say()
            print()
            return
        for number, tokens in enumerate(self.tokens, 1):
            print(f"--- {number}\n{self.tokenizer.decode(tokens)}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
