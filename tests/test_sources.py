"""Files of every format become the samples they should, or an error with file and line."""

import json
from pathlib import Path

import pytest

from mixlora.data import DataConfig, Dataset, Sample, load_dataset
from mixlora.errors import InputError
from mixlora.files import write_json
from mixlora.sources import Columns, Source
from mixlora.templates import TEMPLATES
from mixlora.tokenizer import Tokenizer
from tests.conftest import ARC_ROWS, make_tokenizer, write_rows

REAL = Path(__file__).resolve().parents[2] / "shared/data"
CHAT = (
    "{{ bos_token }}{% for m in messages %}<{{ m.role }}>{{ m.content }}"
    "{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
SAID = [("user", "hens dug mud"), ("assistant", "ten"), ("user", "and cats"), ("assistant", "red")]
MESSAGES = [{"role": role, "content": text} for role, text in SAID]
SHARED = [{"from": {"user": "human", "assistant": "gpt"}[r], "value": text} for r, text in SAID]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    make_tokenizer(folder / "tokenizer.model")
    named = {"bos_token": "<s>", "eos_token": "</s>", "chat_template": CHAT}
    write_json(folder / "tokenizer_config.json", named)
    return Tokenizer(folder)


def load(path: Path, tokenizer: Tokenizer, length: int = 512, **settings: object) -> Dataset:
    config = {key: settings.pop(key) for key in ("append_eos", "loss_on") if key in settings}
    source = Source(str(path), **settings)
    return load_dataset(DataConfig(files=[source], **config), tokenizer, length)


def learned(sample: Sample, tokenizer: Tokenizer) -> list[str]:
    """The texts of the runs of labels, EOS written as |."""
    texts, before = [], -100
    for token, label in zip(*sample, strict=True):
        assert label in (token, -100)
        if label != -100:
            texts += [[]] if before == -100 else []
            texts[-1].append(token)
        before = label
    eos = tokenizer.eos_id
    return [tokenizer.decode(run) + "|" * run.count(eos) for run in texts]


ALPACA = [
    {"instruction": "add {these}", "input": "2 and 3", "output": "5"},
    {"instruction": "sing", "input": "", "output": "la la"},
    {"instruction": "dance", "output": "no"},
    {"instruction": "run", "input": None, "output": "far\n"},
]


@pytest.mark.parametrize("form", ["lines", "array", "bom and crlf"])
def test_instructions(form: str, tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = tmp_path / "rows.json"
    if form == "array":
        path.write_text(json.dumps(ALPACA, indent=2))
    else:
        write_rows(path, ALPACA)
    if form == "bom and crlf":
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n") + b"\r\n")
    dataset = load(path, tokenizer)
    template = TEMPLATES["alpaca"]
    for row, sample in zip(ALPACA, dataset.samples, strict=True):
        prompt = template.prompt(row["instruction"], row.get("input"))
        assert sample.tokens == [*tokenizer.encode(prompt + row["output"]), tokenizer.eos_id]
        assert learned(sample, tokenizer) == [row["output"] + "|"]
    assert "Input:" not in tokenizer.decode(dataset.samples[1].tokens)
    assert [*dataset[1:]] == [[(4, 1.0)], 0, 0, None]
    write_rows(path, [{**row, "text": "of Alpaca's own"} for row in ALPACA])
    assert load(path, tokenizer) == dataset


def test_columns_and_templates(tmp_path: Path, tokenizer: Tokenizer) -> None:
    rows = [{"q": row["instruction"], "c": row.get("input"), "a": row["output"]} for row in ALPACA]
    write_rows(tmp_path / "own.jsonl", rows)
    write_rows(tmp_path / "rows.jsonl", ALPACA)
    for template in ("plain", "moe_peft", "chat"):
        own = load(
            tmp_path / "own.jsonl", tokenizer, template=template, columns=Columns("q", "c", "a")
        )
        assert own == load(tmp_path / "rows.jsonl", tokenizer, template=template)
    sample = own.samples[0]
    text = "<s><user>add {these}\n\n2 and 3<assistant>5</s>"
    assert sample.tokens == tokenizer.encode(text, bos=False)  # one BOS, one EOS
    assert sample.tokens[0] == 1 != sample.tokens[1] and sample.tokens.count(2) == 1
    assert learned(sample, tokenizer) == ["5|"]


@pytest.mark.parametrize("row", [{"messages": MESSAGES}, {"conversations": SHARED}])
def test_the_loss_of_a_conversation_is_on_every_answer(
    row: dict, tmp_path: Path, tokenizer: Tokenizer
) -> None:
    (key,) = row
    entry = row[key][0]
    system = dict(zip(entry, ("system", "old hens"), strict=True))
    more = dict(zip(entry, ("user", "sat"), strict=True))
    rows = [row, {key: [system, *row[key], more]}, {key: [system, row[key][0]]}]
    write_rows(tmp_path / "chat.jsonl", rows)
    samples, _, _, num_skipped, _ = load(tmp_path / "chat.jsonl", tokenizer)
    assert num_skipped == 1  # without an answer
    text = "<user>hens dug mud<assistant>ten</s><user>and cats<assistant>red</s>"
    assert samples[0].tokens == tokenizer.encode("<s>" + text, bos=False)
    assert samples[1].tokens == tokenizer.encode("<s><system>old hens" + text, bos=False)
    for sample in samples:
        assert learned(sample, tokenizer) == ["ten|", "red|"]


def test_every_answer_against_transformers(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """Whose mask of what assistants say is that of a template's generation marks."""
    from transformers import LlamaTokenizer

    marked = (
        "{{ bos_token }}{% for m in messages %}<{{ m.role }}>{% if m.role == 'assistant' %}"
        "{% generation %}{{ m.content }}{{ eos_token }}{% endgeneration %}{% else %}"
        "{{ m.content }}{% endif %}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    (tmp_path / "marked.jinja").write_text(marked)
    write_rows(tmp_path / "chat.jsonl", [{"messages": MESSAGES}])
    template = str(tmp_path / "marked.jinja")
    ((tokens, labels),) = load(tmp_path / "chat.jsonl", tokenizer, template=template).samples
    theirs = LlamaTokenizer.from_pretrained(tokenizer.folder).apply_chat_template(
        MESSAGES, chat_template=marked, return_assistant_tokens_mask=True, return_dict=True
    )
    assert tokens == theirs["input_ids"]
    assert [int(label != -100) for label in labels] == theirs["assistant_masks"]


@pytest.mark.parametrize("length", [2, 7, 64, 100_000])
def test_plain_text_loses_nothing(length: int, tmp_path: Path, tokenizer: Tokenizer) -> None:
    text = "the cat\r\nsat \0 on 👩‍🚀 שלום a mat\n" * 40
    (tmp_path / "a.txt").write_bytes(text.encode())
    write_rows(tmp_path / "a.jsonl", [{"text": text}, {"text": "far"}])
    whole = [*tokenizer.encode(text), tokenizer.eos_id]
    samples, _, num_truncated, num_skipped, _ = load(tmp_path / "a.txt", tokenizer, length)
    assert (num_truncated, num_skipped) == (0, 0)
    assert [id for s in samples for id in s.labels if id != -100] == whole[1:]
    assert max(len(sample.tokens) for sample in samples) <= length
    rows = load(tmp_path / "a.jsonl", tokenizer, length, format="text").samples
    assert rows[: len(samples)] == samples
    far = [*tokenizer.encode("far"), tokenizer.eos_id]
    assert [id for s in rows[len(samples) :] for id in s.labels if id != -100] == far[1:]


@pytest.mark.slow
def test_a_line_of_ten_megabytes(tmp_path: Path, tokenizer: Tokenizer) -> None:
    write_rows(tmp_path / "a.jsonl", [{"text": "ten dogs " * 1_200_000}])
    (part,) = load(tmp_path / "a.jsonl", tokenizer, 512).parts
    assert part.num_samples > 4000


def test_tasks_and_files_together(tmp_path: Path, task_folder: Path, tokenizer: Tokenizer) -> None:
    write_rows(tmp_path / "a.jsonl", ALPACA)
    write_rows(tmp_path / "b.jsonl", [{"messages": MESSAGES}] * 3)
    files = [
        Source(str(tmp_path / "a.jsonl"), weight=0.5, max_samples=3),
        Source(str(tmp_path / "b.jsonl"), weight=2),
    ]
    dataset = load_dataset(DataConfig(["arc-e"], str(task_folder), files=files), tokenizer, 512)
    assert dataset.parts == [(len(ARC_ROWS), 1.0), (3, 0.5), (3, 2)]
    assert len(dataset.samples) == len(ARC_ROWS) + 6
    files[0].weight = 0.1
    with pytest.raises(InputError, match=r"a\.jsonl: weight 0.1 draws none of its 3 samples"):
        load_dataset(DataConfig(files=files), tokenizer, 512)


def test_answers_without_a_token_are_skipped_and_counted(
    tmp_path: Path, tokenizer: Tokenizer
) -> None:
    write_rows(tmp_path / "a.jsonl", [{**ALPACA[0], "output": ""}, ALPACA[1]])
    dataset = load(tmp_path / "a.jsonl", tokenizer, append_eos=False)
    assert (len(dataset.samples), dataset.num_skipped) == (1, 1)
    with_eos = load(tmp_path / "a.jsonl", tokenizer)
    assert learned(with_eos.samples[0], tokenizer) == ["|"]


@pytest.mark.skipif(not REAL.is_dir(), reason="needs ../shared/data")
def test_the_published_alpaca_rows(tmp_path: Path) -> None:
    """Every answer comes back from its labels, under a real tokenizer."""
    (tmp_path / "tokenizer.model").symlink_to(REAL / "tokenizers/llama2.model")
    tokenizer = Tokenizer(tmp_path)
    path = REAL / "instruct/alpaca_demo_999.json"
    template = REAL / "instruct/alpaca_prompt.json"
    dataset = load(path, tokenizer, 4096, template=str(template))
    rows = json.loads(path.read_text(encoding="utf-8"))
    assert len(dataset.samples) == len(rows) == 999
    for row, sample in zip(rows, dataset.samples, strict=True):
        assert [text.strip() for text in learned(sample, tokenizer)] == [
            f"{row['output'].lstrip()}|".strip()
        ]


def talk(*said: tuple[object, object], key: str = "messages") -> dict:
    names = ("role", "content") if key == "messages" else ("from", "value")
    return {key: [dict(zip(names, pair, strict=True)) for pair in said]}


USER, REPLY = ("user", "x"), ("assistant", "y")
GOOD = {"alpaca": ALPACA[0], "chat": {"messages": MESSAGES}, "sharegpt": {"conversations": SHARED}}
ROW_FAULTS = {
    "not JSON": ("alpaca", '{"instruction": ', "not JSON"),
    "list": ("alpaca", "[1]", "a row must be a JSON object, got list"),
    "missing column": (
        "alpaca",
        {"instruction": "a", "outptu": "b"},
        "the row has no key 'output' (did you mean 'outptu'?)",
    ),
    "null": ("alpaca", {"instruction": "a", "output": None}, "output must be text, got None"),
    "number": ("alpaca", {**ALPACA[0], "input": 3}, "input must be text, got 3"),
    "surrogate": ("alpaca", '{"instruction": "\\ud800", "output": "b"}', "half a surrogate pair"),
    "no messages": ("chat", {"mesages": []}, "no key 'messages' (did you mean 'mesages'?)"),
    "messages that are none": ("chat", {"messages": "hi"}, "messages must be a list of messages"),
    "empty": ("chat", {"messages": []}, "messages must be a list of messages, got []"),
    "message that is none": ("chat", {"messages": ["hi"]}, "messages.0 must be an object, got str"),
    "answer first": ("chat", talk(REPLY), "messages.0.role must be system or user at the beg"),
    "user twice": ("chat", talk(USER, USER), "messages.1.role must be assistant after user, got"),
    "answer twice": ("chat", talk(USER, REPLY, REPLY), "messages.2.role must be user after assi"),
    "late system": ("chat", talk(USER, ("system", "z")), "messages.1.role must be assistant after"),
    "unknown role": ("chat", talk(("usr", "x")), "role: unknown role 'usr' (did you mean 'user'?)"),
    "no content": ("chat", {"messages": [{"role": "user"}]}, "has no key 'messages.0.content'"),
    "parts": ("chat", talk(("user", [{"type": "text"}])), "messages.0.content must be text, got"),
    "sharegpt role": (
        "sharegpt",
        talk(("human", "x"), ("bing", "y"), key="conversations"),
        "conversations.1.from: unknown role 'bing'",
    ),
}


@pytest.mark.parametrize("form", ["auto", "named"])
@pytest.mark.parametrize("name", ROW_FAULTS)
def test_a_wrong_row_is_named_by_its_line(
    name: str, form: str, tmp_path: Path, tokenizer: Tokenizer
) -> None:
    kind, row, words = ROW_FAULTS[name]
    good = json.dumps(GOOD[kind])
    bad = row if isinstance(row, str) else json.dumps(row)
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join([good] * 6 + [bad] + [good]))
    with pytest.raises(InputError) as error:
        load(path, tokenizer, format="auto" if form == "auto" else kind)
    assert str(error.value).startswith(f"{path}:7: ") and words in str(error.value)
    if name not in ("not JSON",):
        path.write_text("[\n" + ",\n".join([good] * 4 + [bad] + [good]) + "\n]\n")
        with pytest.raises(InputError) as error:
            load(path, tokenizer)
        assert str(error.value).startswith(f"{path}:6: ") and words in str(error.value)


FILE_FAULTS = {
    "empty": (b"", "rows.jsonl is empty"),
    "blank": (b"\n  \r\n", "rows.jsonl is empty"),
    "empty array": (b"[]", "rows.jsonl is empty"),
    "broken array": (b'[\n{"instruction": "a",\n "output" "b"}]', "rows.jsonl:3: not JSON"),
    "not UTF-8": (b'{"instruction": "\xff"}', "rows.jsonl: not UTF-8"),
    "unknown form": (b'{"prompt": "a"}', "rows.jsonl:1: format auto looks for one of messages, "),
}


@pytest.mark.parametrize("name", FILE_FAULTS)
def test_a_wrong_file(name: str, tmp_path: Path, tokenizer: Tokenizer) -> None:
    content, words = FILE_FAULTS[name]
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content)
    with pytest.raises(InputError) as error:
        load(path, tokenizer)
    assert words in str(error.value)


def test_wrong_settings_of_a_file(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = tmp_path / "chat.jsonl"
    write_rows(path, [{"messages": MESSAGES}])
    with pytest.raises(InputError, match="format chat takes template chat or a .jinja file"):
        load(path, tokenizer, template="alpaca")
    with pytest.raises(InputError, match=r"has no key 'q' .*messages"):
        load(path, tokenizer, format="alpaca", columns=Columns(instruction="q"))
    write_rows(path, [{"text": "a"}])
    with pytest.raises(InputError, match="template must be left out for format text"):
        load(path, tokenizer, template="alpaca")
    (tmp_path / "a.txt").write_text("a")
    with pytest.raises(InputError, match="template must be left out for format text"):
        load(tmp_path / "a.txt", tokenizer, template="alpaca")
    (tmp_path / "empty.txt").write_text(" \n")
    with pytest.raises(InputError, match="empty.txt is empty"):
        load(tmp_path / "empty.txt", tokenizer)
