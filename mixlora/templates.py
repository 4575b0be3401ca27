"""Prompt templates: an instruction, and an input to it or none -> the text to go on from."""

from mixlora.errors import InputError, did_you_mean

# name -> (with an input, without one)
TEMPLATES = {
    "alpaca": (
        "Below is an instruction that describes a task, paired with an input that provides "
        "further context. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n",
        "Below is an instruction that describes a task. Write a response that appropriately "
        "completes the request.\n\n### Instruction:\n{instruction}\n\n### Response:\n",
    ),
    "plain": ("{instruction}\n{input}\n", "{instruction}\n"),
}


def apply_template(name: str, instruction: str, input_text: str | None = None) -> str:
    if name not in TEMPLATES:
        raise InputError(f"unknown template {name!r}{did_you_mean(name, TEMPLATES)}")
    with_input, without = TEMPLATES[name]
    return (with_input if input_text else without).format(instruction=instruction, input=input_text)
