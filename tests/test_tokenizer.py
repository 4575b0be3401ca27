"""Ids equal those of sentencepiece, tiktoken and transformers, on real tokenizers and odd text."""

import functools
import json
import random
import shutil
import sys
from pathlib import Path

import pytest
import sentencepiece
import tokenizers
from transformers.tokenization_utils_base import generate_merges

from mixlora.errors import InputError
from mixlora.files import write_json
from mixlora.tokenizer import Tokenizer
from tests.conftest import make_tokenizer

REAL = Path(__file__).resolve().parents[2] / "shared/data"
needs_real = pytest.mark.skipif(not REAL.is_dir(), reason="needs ../shared/data")
MODELS = {
    name: REAL / "tokenizers" / f"{name}.model" for name in ("llama2", "mistral_v1", "mistral_v3")
}
MODELS["stories260K"] = REAL / "models/stories260K/tokenizer.model"
RANKS = REAL / "tokenizers/llama3.tiktoken"
NUMBERS = [1_500, pytest.param(20_000, marks=pytest.mark.slow)]

ODD = [
    *("", " ", "  ", "\t", "\n", "\r\n", "\r", "a\rb\r\nc\n\nd", "\t\tx\t y ", " two  spaces "),
    *("\0", "a\0b", "\u2581", "x\u2581y", "\u2028", "\u0301", "e\u0301\u0301 \u0301a", "\u200d"),
    *(
        "👩‍🚀",
        "👨‍👩‍👧‍👦🏳️‍🌈",
        "字漢かな한국",
        "שלום עולם",
        "مرحبا 123 بالعالم",
        "\u202eabc",
        "ﬁ ①², Å",
    ),
    *("1234567890", "3.14159e-10", "0x1F", "{}{instruction}%s", "<0x0A>", "don't WE'LL I'm"),
    *("a" * 3000, "ab" * 1000, "=" * 500, " " * 500 + "x", "\n" * 200, "\ufeffx", "\U0010ffff"),
]


@functools.cache
def strings(number: int) -> list[str]:
    """Rows of tasks, instructions, lines of stories and plays, and mixtures of odd characters."""
    rng = random.Random(7)
    real = []
    for path in sorted((REAL / "tasks").rglob("*.jsonl")):
        with open(path, encoding="utf-8") as file:
            for line, _ in zip(file, range(400), strict=False):
                values = json.loads(line).values()
                real.append("\n".join(value for value in values if isinstance(value, str)))
    for row in json.loads((REAL / "instruct/alpaca_demo_999.json").read_text(encoding="utf-8")):
        real += row.values()
    for name in ("tinystories_2MiB.txt", "tinyshakespeare.txt"):
        real += (REAL / "text" / name).read_text(encoding="utf-8").splitlines()[:20_000]
    alphabets = ["abc XYZ", "0123456789 .,", " \t\n\r", "\u0301\u0308e", "שלוםمرح ab", "字👩🚀‍🏳️ a"]
    alphabets.append("".join(map(chr, range(1, 0x250))) + " " * 100)
    mixed = []
    for _ in range(number // 4):
        alphabet = rng.choice(alphabets)
        mixed.append("".join(rng.choices(alphabet, k=rng.randint(0, 60))))
    some = rng.choices(real, k=number - len(ODD) - len(mixed))
    return [*ODD, *mixed, *some]


def link(folder: Path, path: Path) -> Path:
    (folder / "tokenizer.model").symlink_to(path)
    return folder


def differing(ours: list[list[int]], theirs: list[list[int]], texts: list[str]) -> list[str]:
    return [t for t, a, b in zip(texts, ours, theirs, strict=True) if a != b]


@needs_real
@pytest.mark.parametrize("number", NUMBERS)
@pytest.mark.parametrize("name", MODELS)
def test_a_sentencepiece_model(name: str, number: int, tmp_path: Path) -> None:
    tokenizer = Tokenizer(link(tmp_path, MODELS[name]))
    model = sentencepiece.SentencePieceProcessor(model_file=str(MODELS[name]))
    texts = strings(number)
    assert len(texts) == number
    ours = [tokenizer.encode(text) for text in texts]
    assert differing(ours, [[model.bos_id(), *model.encode(text)] for text in texts], texts) == []
    assert tokenizer.vocab_size == model.vocab_size()
    # A space and sentencepiece's sign for it are the same piece.
    wrong = [t for t, ids in zip(texts, ours, strict=True) if tokenizer.decode(ids) != unspace(t)]
    assert wrong == []


def unspace(text: str) -> str:
    return text.replace("\u2581", " ")


def published_form(path: Path) -> tokenizers.Tokenizer:
    """The tokenizer.json of LLaMA-2's repository: merges by score, spaces by a normalizer."""
    model = sentencepiece.SentencePieceProcessor(model_file=str(path))
    pieces = [model.id_to_piece(id) for id in range(model.vocab_size())]
    scores = {piece: model.get_score(id) for id, piece in enumerate(pieces)}
    vocab = {piece: id for id, piece in enumerate(pieces)}
    merges = generate_merges(vocab, scores)
    bpe = tokenizers.models.BPE(vocab, merges, fuse_unk=True, byte_fallback=True, unk_token="<unk>")
    tokenizer = tokenizers.Tokenizer(bpe)
    spaces = [
        tokenizers.normalizers.Prepend("\u2581"),
        tokenizers.normalizers.Replace(" ", "\u2581"),
    ]
    tokenizer.normalizer = tokenizers.normalizers.Sequence(spaces)
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        "<s> $A", None, [("<s>", 1)]
    )
    decoders = tokenizers.decoders
    steps = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)])
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    return tokenizer


@needs_real
@pytest.mark.parametrize(
    "name, number",
    [("llama2", 1_500), ("stories260K", 1_500)]
    + [pytest.param(name, 20_000, marks=pytest.mark.slow) for name in MODELS],
)
def test_a_tokenizer_json_made_by_transformers(name: str, number: int, tmp_path: Path) -> None:
    """As transformers reads it, and, in the form of the published LLaMA-2, as sentencepiece does.

    What transformers 5 makes of a bare tokenizer.model merges runs of spaces first and leaves out
    the space before a text that begins with one; the published file and sentencepiece do not.
    """
    from transformers import LlamaTokenizer, PreTrainedTokenizerFast

    theirs = LlamaTokenizer.from_pretrained(link(tmp_path, MODELS[name]), add_bos_token=True)
    theirs.save_pretrained(tmp_path / "saved")
    tokenizer = Tokenizer(tmp_path / "saved")
    model = Tokenizer(tmp_path)
    texts = strings(number)
    ours = [tokenizer.encode(text) for text in texts]
    assert differing(ours, theirs(texts).input_ids, texts) == []
    fast = PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "saved/tokenizer.json"))
    assert differing(ours, fast(texts).input_ids, texts) == []
    assert tokenizer.vocab_size == len(theirs) == model.vocab_size
    assert (tokenizer.bos_id, tokenizer.eos_id) == (theirs.bos_token_id, theirs.eos_token_id)
    special = ["a</s> b", "<s>x", "x <unk></s>"]
    assert [tokenizer.encode(text) for text in special] == theirs(special).input_ids

    published_form(MODELS[name]).save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "generation_config.json").write_text('{"bos_token_id": 1, "eos_token_id": 2}')
    published = Tokenizer(tmp_path)
    ours = [published.encode(text) for text in texts]
    assert differing(ours, [model.encode(text) for text in texts], texts) == []
    assert [
        t for t, ids in zip(texts, ours, strict=True) if published.decode(ids) != unspace(t)
    ] == []


@needs_real
@pytest.mark.parametrize("number", NUMBERS)
def test_the_ranks_of_llama_3(number: int, tmp_path: Path) -> None:
    from tiktoken.load import load_tiktoken_bpe
    from transformers import PreTrainedTokenizerFast
    from transformers.convert_slow_tokenizer import TikTokenConverter

    tokenizer = Tokenizer(link(tmp_path, RANKS))
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.vocab_size) == (128000, 128001, 128256)
    assert load_tiktoken_bpe(str(RANKS)) == tokenizer._reader._model._mergeable_ranks
    names = [tokenizer._reader.text_of(id) for id in range(128000, 128256)]
    assert (names[6], names[7], names[9]) == (
        "<|start_header_id|>",
        "<|end_header_id|>",
        "<|eot_id|>",
    )
    assert names[2] == "<|reserved_special_token_0|>"
    assert names[255] == "<|reserved_special_token_250|>"
    converter = TikTokenConverter(vocab_file=str(RANKS), extra_special_tokens=names)
    fast = PreTrainedTokenizerFast(tokenizer_object=converter.converted())
    texts = [*strings(number), "a<|eot_id|> b<|end_of_text|>", "<|start_header_id|>user"]
    ours = [tokenizer.encode(text) for text in texts]
    assert differing(ours, [[128000, *ids] for ids in fast(texts).input_ids], texts) == []
    plain = zip(texts[:-2], ours, strict=False)
    assert [text for text, ids in plain if tokenizer.decode(ids) != text] == []
    fast.save_pretrained(tmp_path / "saved")
    write_json(tmp_path / "saved/config.json", {"bos_token_id": 128000, "eos_token_id": 128001})
    saved = Tokenizer(tmp_path / "saved")
    assert [saved.encode(text) for text in texts] == [ids[1:] for ids in ours]
    assert (saved.eos_id, saved.vocab_size) == (128001, 128256)


@needs_real
def test_tokens_added_to_llama_2(tmp_path: Path) -> None:
    """As transformers finds them in text; what follows one gets no space of its own."""
    from transformers import LlamaTokenizer

    shutil.copy(MODELS["llama2"], tmp_path / "tokenizer.model")
    added = {32000: ("<|im_start|>", True), 32001: ("<|im_end|>", True), 32002: ("<tool>", False)}
    decoder = {str(id): {"content": text, "special": on} for id, (text, on) in added.items()}
    unk = {"__type": "AddedToken", "content": "<unk>", "special": True}
    named = {"bos_token": "<s>", "eos_token": "<|im_end|>", "unk_token": unk}
    config = {**named, "add_bos_token": True, "added_tokens_decoder": decoder}
    write_json(tmp_path / "tokenizer_config.json", config)
    tokenizer = Tokenizer(tmp_path)
    theirs = LlamaTokenizer.from_pretrained(tmp_path)
    texts = ["<|im_start|>user\nhi there<|im_end|>\n<tool> x<tool>", "a <s> b", "x", "</s>"]
    for text in texts[:3]:
        assert tokenizer.encode(text) == theirs(text).input_ids
    assert tokenizer.encode("</s>") == [1, 1533, 29879, 29958]  # no file names it
    assert (tokenizer.eos_id, tokenizer.vocab_size, tokenizer.pad_id) == (32001, 32003, 0)
    assert tokenizer.decode(tokenizer.encode(texts[0])) == "user\nhi there\n<tool> x<tool>"
    with pytest.raises(InputError, match="has 32003 tokens, the model 32000"):
        Tokenizer(tmp_path, 32000)
    assert Tokenizer(tmp_path, 32064).vocab_size == 32003

    config.pop("added_tokens_decoder")
    write_json(tmp_path / "tokenizer_config.json", config)
    write_json(tmp_path / "added_tokens.json", {text: id for id, (text, _) in added.items()})
    older = Tokenizer(tmp_path)
    assert [older.encode(text) for text in texts] == [tokenizer.encode(text) for text in texts]


@pytest.mark.parametrize("bos", [False, True])
def test_tokens_added_beside_a_tokenizer_json(tmp_path: Path, bos: bool) -> None:
    """And that the tokenizer.json wins over a tokenizer.model of another vocabulary, and its
    post-processor over add_bos_token."""
    from transformers import AutoTokenizer, LlamaTokenizer

    make_tokenizer(tmp_path / "tokenizer.model")
    LlamaTokenizer.from_pretrained(tmp_path, add_bos_token=bos).save_pretrained(tmp_path)
    make_tokenizer(tmp_path / "tokenizer.model", vocab_size=350)
    flags = {"lstrip": False, "single_word": False, "normalized": False}
    added = {
        "384": {"content": "<tool>", "special": False, "rstrip": False, **flags},
        "385": {"content": "<|x|>", "special": True, "rstrip": True, **flags},
    }
    named = {"bos_token": "<s>", "eos_token": "<|x|>", "additional_special_tokens": ["\u2581mat"]}
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "add_bos_token": not bos, **named}
    write_json(tmp_path / "tokenizer_config.json", {**config, "added_tokens_decoder": added})
    tokenizer, theirs = Tokenizer(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    texts = ["the cat", "<tool> a<|x|>  red<s> mat", "on a\u2581mat", "</s>"]
    assert [tokenizer.encode(text) for text in texts] == theirs(texts).input_ids
    assert tokenizer.vocab_size == len(theirs) == 386
    assert tokenizer.eos_id == theirs.eos_token_id == 385
    ids = tokenizer.encode(texts[1])
    assert tokenizer.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
    added["384"]["content"] = "a"  # which has another id
    write_json(tmp_path / "tokenizer_config.json", {**config, "added_tokens_decoder": added})
    with pytest.raises(InputError, match=r"token 'a' is 384 in tokenizer_config.json, \d+ here"):
        Tokenizer(tmp_path)


@pytest.mark.parametrize("add_bos, add_eos", [(None, None), (False, None), (True, True)])
def test_bos_is_added_as_the_files_say_and_eos_never(
    tmp_path: Path, add_bos: bool | None, add_eos: bool | None
) -> None:
    from transformers import LlamaTokenizer

    make_tokenizer(tmp_path / "tokenizer.model")
    said = {"add_bos_token": add_bos, "add_eos_token": add_eos}
    config = {key: value for key, value in said.items() if value is not None}
    write_json(tmp_path / "tokenizer_config.json", config)
    theirs = LlamaTokenizer.from_pretrained(tmp_path)
    theirs.save_pretrained(tmp_path / "saved")
    model, saved = Tokenizer(tmp_path), Tokenizer(tmp_path / "saved")
    expected = theirs("the cat").input_ids
    if add_eos:
        assert expected.pop() == theirs.eos_token_id
    assert saved.encode("the cat") == expected
    plain = [id for id in expected if id != theirs.bos_token_id]
    assert model.encode("the cat") == ([1] if add_bos in (None, True) else []) + plain
    assert model.encode("the cat", bos=False) == saved.encode("the cat", bos=False) == plain
    assert (saved.bos_id, saved.eos_id) == (model.bos_id, model.eos_id) == (1, 2)


@pytest.mark.parametrize(
    "named, pad_id",
    [
        ({"pad_token": "the", "unk_token": "<unk>"}, None),
        ({}, 0),  # the sentencepiece model's unk
        ({"pad_token": "not there"}, 0),
    ],
)
def test_the_padding_of_the_published_training(
    tmp_path: Path, named: dict, pad_id: int | None
) -> None:
    make_tokenizer(tmp_path / "tokenizer.model")
    model = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    if named.get("pad_token") == "the":
        named, pad_id = {**named, "pad_token": "\u2581the"}, model.piece_to_id("\u2581the")
    write_json(tmp_path / "tokenizer_config.json", named)
    assert Tokenizer(tmp_path).pad_id == pad_id


def test_ids_of_the_models_own_config(tmp_path: Path) -> None:
    """Where a tokenizer.json comes alone; a pad_token_id of -1 is none."""
    from transformers import LlamaTokenizer

    make_tokenizer(tmp_path / "tokenizer.model")
    theirs = LlamaTokenizer.from_pretrained(tmp_path, add_bos_token=True)
    theirs.backend_tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer.model").unlink()
    with pytest.raises(InputError, match="no BOS or no EOS"):
        Tokenizer(tmp_path)
    write_json(tmp_path / "config.json", {"bos_token_id": 5, "eos_token_id": 2, "pad_token_id": -1})
    tokenizer = Tokenizer(tmp_path)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (1, 2, 2)
    write_json(tmp_path / "tokenizer_config.json", {"bos_token": "</s>"})
    with pytest.raises(InputError, match="post-processor adds '<s>', bos_token is '</s>'"):
        Tokenizer(tmp_path)


def test_more_tokens_end_a_text(tmp_path: Path) -> None:
    make_tokenizer(tmp_path / "tokenizer.model")
    write_json(tmp_path / "generation_config.json", {"eos_token_id": [2, 7]})
    assert Tokenizer(tmp_path).stop_ids == [2, 7]


def test_parts_of_a_text(tmp_path: Path) -> None:
    make_tokenizer(tmp_path / "tokenizer.model")
    tokenizer = Tokenizer(tmp_path)
    texts = ["the ca", "t sat", " on", "", " a mat"]
    parts = tokenizer.split(texts)
    assert sum(parts, []) == tokenizer.encode("the cat sat on a mat")
    assert parts[3] == [] and tokenizer.decode(parts[2]) == "on"
    assert tokenizer.split(["the cat"]) == [tokenizer.encode("the cat")]


FAULTS = {
    "no tokenizer": ({}, "tokenizer.model: no such file"),
    "broken tokenizer.json": ({"tokenizer.json": b"{}"}, "tokenizer.json: not a tokenizer"),
    "broken ranks": ({"tokenizer.model": b"IQ== 0\nIg==\n"}, "tokenizer.model:2: not a token and"),
    "ranks with a hole": ({"tokenizer.model": b"IQ== 0\nIg== 2\n"}, "ranks are not 0 to 1"),
    "broken tokenizer_config.json": ({"tokenizer_config.json": b"{"}, "config.json:1: not JSON"),
    "added tokens that are none": (
        {"tokenizer_config.json": b'{"added_tokens_decoder": {"x": 1}}'},
        "added tokens cannot be read",
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_tokenizer_that_cannot_be_read(name: str, tmp_path: Path) -> None:
    files, words = FAULTS[name]
    for file, content in files.items():
        (tmp_path / file).write_bytes(content)
    with pytest.raises(InputError) as error:
        Tokenizer(tmp_path)
    assert words in str(error.value) and str(tmp_path) in str(error.value)


def test_names_that_the_tokenizer_does_not_have(tmp_path: Path) -> None:
    make_tokenizer(tmp_path / "tokenizer.model")
    write_json(tmp_path / "tokenizer_config.json", {"eos_token": "<|end|>"})
    with pytest.raises(InputError, match="no token '<|end|>', its eos_token"):
        Tokenizer(tmp_path)
    stripped = {"content": "<x>", "rstrip": True}
    write_json(tmp_path / "tokenizer_config.json", {"added_tokens_decoder": {"384": stripped}})
    with pytest.raises(InputError, match="'<x>' has rstrip, which needs a tokenizer.json"):
        Tokenizer(tmp_path)


@pytest.mark.parametrize("package", ["tokenizers", "tiktoken"])
def test_a_package_that_is_not_there(
    package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "tokenizer.json" if package == "tokenizers" else "tokenizer.model"
    (tmp_path / name).write_text("IQ== 0\n")
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(InputError, match=f"pip install {package}"):
        Tokenizer(tmp_path)
