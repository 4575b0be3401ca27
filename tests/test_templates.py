"""Prompts are the published ones to the letter; chats are what transformers renders."""

import json
import shutil
import sys
from pathlib import Path

import pytest

import generate
from mixlora.errors import InputError
from mixlora.files import write_json
from mixlora.templates import ChatTemplate, find_template, read_template
from mixlora.tokenizer import Tokenizer
from tests.conftest import make_tokenizer

REAL = Path(__file__).resolve().parents[2] / "shared/data"
INSTRUCT = REAL / "instruct/alpaca_prompt.json"

# In the style of the published templates.
CHATS = {
    "llama-2": (
        "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}"
        "{% set system_message = messages[0]['content'] %}{% else %}"
        "{% set loop_messages = messages %}{% set system_message = false %}{% endif %}"
        "{% for message in loop_messages %}"
        "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('Conversation roles must alternate user/assistant/...') }}{% endif %}"
        "{% if loop.index0 == 0 and system_message != false %}"
        "{% set content = '<<SYS>>\\n' + system_message + '\\n<</SYS>>\\n\\n' "
        "+ message['content'] %}"
        "{% else %}{% set content = message['content'] %}{% endif %}"
        "{% if message['role'] == 'user' %}"
        "{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}"
        "{% elif message['role'] == 'assistant' %}"
        "{{ ' '  + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
    ),
    "llama-3": (
        "{% set loop_messages = messages %}{% for message in loop_messages %}"
        "{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'"
        "+ message['content'] | trim + '<|eot_id|>' %}"
        "{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}"
        "{{ content }}{% endfor %}{% if add_generation_prompt %}"
        "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
    ),
    "mistral": (
        "{%- if messages[0].role == 'system' %}\n  {%- set system = messages[0].content %}\n"
        "  {%- set rest = messages[1:] %}\n{%- else %}\n  {%- set rest = messages %}\n"
        "{%- endif %}\n"
        "{{- bos_token }}\n{%- for message in rest %}\n"
        "  {%- if message.role == 'user' %}\n"
        "    {%- if loop.first and system is defined %}\n"
        "      {{- '[INST] ' + system + '\\n\\n' + message.content + '[/INST]' }}\n"
        "    {%- else %}\n      {{- '[INST] ' + message.content + '[/INST]' }}\n    {%- endif %}\n"
        "  {%- elif message.role == 'assistant' %}\n"
        "    {%- generation %}{{- ' ' + message.content + eos_token }}{%- endgeneration %}\n"
        "  {%- else %}\n    {{- raise_exception('Only user and assistant roles') }}\n"
        "  {%- endif %}\n{%- endfor %}\n"
    ),
    "gemma": (
        "{{ bos_token }}{% for message in messages %}"
        "{% if message['role'] == 'system' %}{% set role = 'user' %}"
        "{% elif message['role'] == 'assistant' %}{% set role = 'model' %}"
        "{% else %}{% set role = message['role'] %}{% endif %}"
        "{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{'<start_of_turn>model\n'}}{% endif %}"
    ),
    "tools and loops": (
        "{%- set ns = namespace(n=0) %}{% for m in messages %}\n"
        "  {% if m.role == 'system' %}{% continue %}{% endif %}\n"
        "  {% set ns.n = ns.n + 1 %}\n<{{ ns.n }}>{{ m | tojson }}"
        "{{ [1, 'é<&'] | tojson(indent=1) }}"
        "{% endfor %}{{ strftime_now('%Y') | length }}{% if tools is none %}none{% endif %}"
        "{% if add_generation_prompt %}<go>{% endif %}"
    ),
}
TALK = [
    {"role": "system", "content": "Be {brief} <b>."},
    {"role": "user", "content": "{{ hello }} {instruction} é 👩‍🚀 %s"},
    {"role": "assistant", "content": "the cat {sat}"},
    {"role": "user", "content": "  on a\n\nmat?  "},
    {"role": "assistant", "content": "ten dogs"},
]
ENDS = {"llama-2": "</s>", "llama-3": "<|eot_id|>", "mistral": "</s>", "gemma": "<end_of_turn>\n"}


def make_chat(folder: Path, source: str | list) -> Tokenizer:
    make_tokenizer(folder / "tokenizer.model")
    words = "<|start_header_id|> <|end_header_id|> <|eot_id|> <start_of_turn> <end_of_turn>".split()
    added = {str(384 + i): {"content": word, "special": True} for i, word in enumerate(words)}
    named = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "add_bos_token": True}
    config = {**named, "added_tokens_decoder": added, "chat_template": source}
    write_json(folder / "tokenizer_config.json", config)
    return Tokenizer(folder)


@pytest.mark.parametrize("name", CHATS)
def test_a_chat_is_what_transformers_renders(name: str, tmp_path: Path) -> None:
    from transformers import LlamaTokenizer

    tokenizer = make_chat(tmp_path, CHATS[name])
    theirs = LlamaTokenizer.from_pretrained(tmp_path)
    template = find_template("chat", tokenizer)
    for messages in (TALK, TALK[1:], TALK[:2], TALK[1:2], TALK[1:4]):
        for prompt in (False, True):
            wanted = theirs.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=prompt
            )
            text = template.render(messages, prompt)
            assert text == wanted
            # Its tokens: the template's BOS and no other, special tokens as such.
            ids = theirs.apply_chat_template(messages, add_generation_prompt=prompt)["input_ids"]
            ours = tokenizer.encode(text, bos=False)
            if not text.startswith(" "):
                assert ours == ids
            if name in ENDS:
                assert ours[0] == 1 != ours[1]


@pytest.mark.parametrize("name", ENDS)
def test_answers_of_a_chat_end_with_the_templates_end_token(name: str, tmp_path: Path) -> None:
    template = find_template("chat", make_chat(tmp_path, CHATS[name]))
    for messages in (TALK, TALK[1:]):
        spans = template.spans(messages)
        assert "".join(span.text for span in spans) == template.render(messages)
        answers = [span.text for span in spans if span.is_answer]
        assert [answer.strip(" ") for answer in answers] == [
            f"the cat {{sat}}{' ' * (name == 'llama-2')}{ENDS[name]}",
            f"ten dogs{' ' * (name == 'llama-2')}{ENDS[name]}",
        ]


def test_a_template_that_rewrites_earlier_turns_is_refused(tmp_path: Path) -> None:
    source = "{% for m in messages %}{% if loop.last %}{{ m.content }}{% endif %}{% endfor %}"
    template = find_template("chat", make_chat(tmp_path, source))
    with pytest.raises(InputError, match="message 2 is not written alike"):
        template.spans(TALK)


def test_where_a_chat_template_is_looked_for(tmp_path: Path) -> None:
    tokenizer = make_chat(tmp_path, [{"name": "default", "template": "D"}, {"name": "tool_use"}])
    assert find_template("chat", tokenizer).render(TALK) == "D"
    (tmp_path / "chat_template.jinja").write_text("J{{ eos_token }}")
    assert find_template("chat", tokenizer).render(TALK) == "J</s>"
    (tmp_path / "my.jinja").write_text("M")
    assert find_template(str(tmp_path / "my.jinja"), tokenizer).render(TALK) == "M"


UNSAFE = ["{{ ''.__class__.__mro__ }}", "{{ messages.append(1) }}", "{% for i in 5 %}{% endfor %}"]
UNSAFE += ["{{ 1 // 0 }}", "{{ nothing.at.all }}", "{{ raise_exception('no') }}"]


@pytest.mark.parametrize("source", UNSAFE)
def test_a_template_that_does_what_it_must_not(source: str) -> None:
    with pytest.raises(InputError, match="^here: "):
        ChatTemplate(source, {}, "here").render([dict(message) for message in TALK])


def test_templates_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = make_chat(tmp_path, None)
    with pytest.raises(InputError, match="tokenizer_config.json: no chat_template, nor"):
        find_template("chat", tokenizer)
    with pytest.raises(InputError, match="here: not a chat template: "):
        ChatTemplate("{% if %}", {}, "here")
    with pytest.raises(InputError, match="my.jinja: no such file"):
        find_template(str(tmp_path / "my.jinja"), tokenizer)
    with pytest.raises(InputError, match=r"'alpacca' \(did you mean 'alpaca'"):
        find_template("alpacca", tokenizer)
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(InputError, match="pip install jinja2"):
        ChatTemplate("x", {}, "here")


ALPACA = (
    "Below is an instruction that describes a task, paired with an input that provides further "
    "context. Write a response that appropriately completes the request.\n\n### Instruction:\n"
    "{i} {instruction}\n\n### Input:\n{input} }{\n\n### Response:\n"
)


def test_prompt_templates(tmp_path: Path) -> None:
    tokenizer = make_chat(tmp_path, None)
    odd = ("{i} {instruction}", "{input} }{")
    assert find_template("alpaca", tokenizer).prompt(*odd) == ALPACA
    assert find_template("plain", tokenizer).prompt(*odd) == "{i} {instruction}\n{input} }{\n"
    moe_peft = find_template("moe_peft", tokenizer)
    assert moe_peft.prompt("{}") == "### Instruction:\n{}\n\n### Output:\n"
    assert moe_peft.prompt("a", "b") == "### Instruction:\na\n\n### Input:\nb\n\n### Output:\n"
    assert moe_peft.prompt("a", "") == moe_peft.prompt("a", None) == moe_peft.prompt("a")


@pytest.mark.skipif(not INSTRUCT.is_file(), reason="needs ../shared/data")
def test_a_template_file_of_mlora(tmp_path: Path) -> None:
    tokenizer = make_chat(tmp_path, None)
    from_file, own = find_template(str(INSTRUCT), tokenizer), find_template("alpaca", tokenizer)
    published = json.loads(INSTRUCT.read_text())
    assert from_file == own == (published["prompt_input"], published["prompt_no_input"])


TEMPLATE_FAULTS = {
    "unknown key": ({"prompt_inptu": "x"}, "unknown key 'prompt_inptu' (did you mean 'prompt_inp"),
    "missing": ({"prompt_input": "x"}, "prompt_no_input must be text, got None"),
    "no text": ({"prompt_input": 1, "prompt_no_input": "x"}, "prompt_input must be text, got 1"),
    "attribute": (
        {"prompt_input": "{instruction.__class__}", "prompt_no_input": "x"},
        "prompt_input holds {instruction.__class__}, may hold {instruction}, {input}",
    ),
    "input where there is none": (
        {"prompt_input": "x", "prompt_no_input": "{input}"},
        "prompt_no_input holds {input}",
    ),
    "format": ({"prompt_input": "{instruction:>9}", "prompt_no_input": "x"}, "prompt_input holds"),
    "brace": ({"prompt_input": "{", "prompt_no_input": "x"}, "prompt_input: "),
}


@pytest.mark.parametrize("name", TEMPLATE_FAULTS)
def test_a_wrong_template_file(name: str, tmp_path: Path) -> None:
    content, words = TEMPLATE_FAULTS[name]
    write_json(tmp_path / "t.json", content)
    with pytest.raises(InputError) as error:
        read_template(tmp_path / "t.json")
    assert f"{tmp_path}/t.json: {words}" in str(error.value)
    write_json(tmp_path / "t.json", {"prompt_input": "{{}}{instruction}", "prompt_no_input": "x"})
    assert read_template(tmp_path / "t.json").prompt("{a}", "b") == "{}{a}"


def test_generate_with_the_checkpoints_chat_template(
    tmp_path: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = shutil.copytree(checkpoint, tmp_path / "chat")
    config = {"bos_token": "<s>", "eos_token": "</s>", "chat_template": CHATS["llama-2"]}
    write_json(folder / "tokenizer_config.json", config)
    write_json(folder / "generation_config.json", {"eos_token_id": [2, 9]})
    heard = {}

    def record(model: object, prompts: list, max_new_tokens: int, *more: object) -> None:
        heard.update(prompts=prompts, stop=more[1])

    monkeypatch.setattr(generate, "generate", record)
    arguments = ["--base", str(folder), "--instruction", "the cat", "--input", "sat"]
    assert generate.main([*arguments, "--template", "chat"]) == 0
    tokenizer = Tokenizer(folder)
    wanted = tokenizer.encode("<s>[INST] the cat\n\nsat [/INST]", bos=False)
    assert heard["prompts"] == [wanted] and wanted.count(1) == 1
    assert heard["stop"] == [2, 9, 1]
    assert generate.main([*arguments, "--template", "plain"]) == 0
    assert heard["prompts"] == [tokenizer.encode("the cat\nsat\n")]
