"""Text <-> token ids, by the tokenizer that lies in a checkpoint's folder.

    tokenizer.json    wins where it is there, as in transformers; read by the package tokenizers
    tokenizer.model   a sentencepiece model, or LLaMA-3's ranks ("<base64> <rank>" a line), read by
                      the package tiktoken

tokenizer_config.json says more, where it is there: bos_token and the like (else
special_tokens_map.json, the tokenizer itself, generation_config.json, config.json, in this order),
and tokens added to the vocabulary (else added_tokens.json). A tokenizer.json puts BOS before a text
if its post-processor does, whatever add_bos_token says, as in transformers; a tokenizer.model does,
unless add_bos_token is false.

Tokens that these files name are found in any text, as transformers finds them; the control pieces
of a sentencepiece model that no file names are not, as in sentencepiece.
"""

import abc
import base64
import importlib
import re
from pathlib import Path
from types import ModuleType

import sentencepiece

from mixlora.errors import InputError
from mixlora.files import read_json

NAMED = ("bos_token", "eos_token", "unk_token", "pad_token")
FLAGS = ("special", "lstrip", "rstrip", "single_word", "normalized")
RANK_LINE = re.compile(rb"[A-Za-z0-9+/]+=* \d+\r?\n")
LLAMA3_SPLIT = (  # of llama3/tokenizer.py
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3_NUM_SPECIAL = 256
LLAMA3_SPECIAL = {0: "begin_of_text", 1: "end_of_text", 9: "eot_id"} | {
    6: "start_header_id",
    7: "end_header_id",
}
MARK = "\x1a"  # in no vocabulary, so that no piece joins it with what follows


class Tokenizer:
    """Ids `bos_id` (None where there is none), `eos_id`, `pad_id` and `stop_ids`, `vocab_size`.

    `stop_ids` end a generated text: EOS and what generation_config.json adds to it. `pad_id` is
    what the published training pads with; padding here needs no token. `special_tokens` are the
    texts of bos_token and the like. `num_embeddings` of the model, where it is given, must be
    enough for every id; a larger embedding is fine.
    """

    def __init__(self, folder: str | Path, num_embeddings: int | None = None) -> None:
        self.folder = Path(folder)
        self.settings = read_settings(self.folder)
        path = self.folder / "tokenizer.json"
        if path.is_file():
            self._reader: Reader = TokenizersFile(path, self.settings)
        else:
            path = self.folder / "tokenizer.model"
            if not path.is_file():
                raise InputError(f"{path}: no such file (and no tokenizer.json beside it)")
            with open(path, "rb") as file:
                is_ranks = RANK_LINE.fullmatch(file.readline(1000))
            self._reader = (Tiktoken if is_ranks else Sentencepiece)(path, self.settings)
        self.vocab_size = self._reader.size
        ids = {name: self._named_id(name, path) for name in NAMED}
        self.bos_id, eos_id = ids["bos_token"], ids["eos_token"]
        self.special_tokens = {
            name: self._reader.text_of(id) for name, id in ids.items() if id is not None
        }
        if eos_id is None or (self.bos_id is None and self._reader.adds_bos):
            raise InputError(f"{path}: the tokenizer has no BOS or no EOS token")
        self.eos_id: int = eos_id
        padding = (ids["pad_token"], ids["unk_token"], eos_id)  # MoE-PEFT's choice
        self.pad_id = next(id for id in padding if id is not None)
        more = _settings_id(self.folder / "generation_config.json", "eos_token_id")
        self.stop_ids = sorted({self.eos_id, *more})
        if num_embeddings is not None and self.vocab_size > num_embeddings:
            raise InputError(
                f"{path}: the tokenizer has {self.vocab_size} tokens, the model {num_embeddings}"
            )

    def encode(self, text: str, bos: bool = True) -> list[int]:
        """Ids with the BOS that the tokenizer puts before every text, if it does, without EOS."""
        try:
            text.encode()
        except UnicodeError:  # half a surrogate pair: bytes of the command line that are not UTF-8
            raise InputError(f"the text is not Unicode: {text[:100]!r}") from None
        before = [self.bos_id] if bos and self._reader.adds_bos else []
        return before + self._reader.encode(text)

    def decode(self, tokens: list[int]) -> str:
        """The text, without special tokens."""
        return self._reader.decode(tokens)

    def split(self, texts: list[str], bos: bool = True) -> list[list[int]]:
        """The ids that each text adds to those before it, all tokenised as one string.

        A tokenizer may join a text's last characters with the next one's first; a part ends where
        the ids of the texts so far, taken alone, stop being those of the whole.
        """
        whole = self.encode("".join(texts), bos)
        parts, start = [], 0
        for i in range(1, len(texts)):
            alone = self.encode("".join(texts[:i]), bos)
            common = 0
            while common < min(len(alone), len(whole)) and alone[common] == whole[common]:
                common += 1
            parts.append(whole[start:common])
            start = max(start, common)
        return [*parts, whole[start:]]

    def continuation(self, prompt: str, text: str) -> tuple[list[int], list[int]]:
        """(ids of the prompt, ids that `text` adds to it), the two tokenised as one string."""
        before, added = self.split([prompt, text])
        return before, added

    def _named_id(self, name: str, path: Path) -> int | None:
        text = content_of(self.settings.get(name))
        if text is not None:
            found = self._reader.id_of(text)
            if found is None and name in ("bos_token", "eos_token"):
                raise InputError(f"{path}: the tokenizer has no token {text!r}, its {name}")
            return found
        if name in self._reader.named:
            return self._reader.named[name]
        for file in ("generation_config.json", "config.json"):
            for found in _settings_id(self.folder / file, f"{name}_id"):
                if 0 <= found < self.vocab_size:  # LLaMA-1's config.json has -1
                    return found
        return None


class Reader(abc.ABC):
    """One kind of file. `named` holds what the file itself says of bos_token and the like."""

    size: int
    adds_bos: bool
    named: dict[str, int]

    @abc.abstractmethod
    def encode(self, text: str) -> list[int]: ...

    @abc.abstractmethod
    def decode(self, tokens: list[int]) -> str: ...

    @abc.abstractmethod
    def id_of(self, token: str) -> int | None: ...

    @abc.abstractmethod
    def text_of(self, token: int) -> str: ...


class TokenizersFile(Reader):
    def __init__(self, path: Path, settings: dict) -> None:
        tokenizers = _package("tokenizers", path)
        try:
            self._model = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the package raises nothing more special
            raise InputError(
                f"{path}: not a tokenizer of the package tokenizers: {error}"
            ) from None
        self._model.no_truncation()
        self._model.no_padding()
        for id, token in sorted(settings["added"].items()):
            if self._model.token_to_id(token["content"]) is None:
                flags = {flag: bool(token.get(flag)) for flag in FLAGS if flag in token}
                added = tokenizers.AddedToken(token["content"], **flags)
                self._model.add_tokens([added])
            if self._model.token_to_id(token["content"]) != id:
                raise InputError(
                    f"{path}: token {token['content']!r} is {id} in tokenizer_config.json, "
                    f"{self._model.token_to_id(token['content'])} here"
                )
        already = {token.content for token in self._model.get_added_tokens_decoder().values()}
        known = [text for text in settings["special"] if self.id_of(text) is not None]
        self._model.add_special_tokens([text for text in known if text not in already])
        self.size = max(self._model.get_vocab(with_added_tokens=True).values()) + 1
        self.named = {}
        probe = self._model.encode("a")
        is_own = [not mask for mask in probe.special_tokens_mask]
        first, end = is_own.index(True), len(is_own) - is_own[::-1].index(True)
        before, after = probe.ids[:first], probe.ids[end:]
        if len(before) > 1 or len(after) > 1:
            raise InputError(f"{path}: its post-processor adds more than a BOS and an EOS")
        self.adds_bos = bool(before)
        bos = content_of(settings.get("bos_token"))
        if before and bos is not None and self.id_of(bos) != before[0]:
            found = self.text_of(before[0])
            raise InputError(f"{path}: its post-processor adds {found!r}, bos_token is {bos!r}")
        if before:
            self.named["bos_token"] = before[0]
        if after:
            self.named["eos_token"] = after[0]

    def encode(self, text: str) -> list[int]:
        return self._model.encode(text, add_special_tokens=False).ids

    def decode(self, tokens: list[int]) -> str:
        return self._model.decode(tokens, skip_special_tokens=True)

    def id_of(self, token: str) -> int | None:
        return self._model.token_to_id(token)

    def text_of(self, token: int) -> str:
        return self._model.id_to_token(token) or ""


class Sentencepiece(Reader):
    """With tokens added by tokenizer_config.json: the text between them goes to sentencepiece.

    Only a text's beginning gets the space that the model puts before it, or, as in LlamaTokenizer
    with legacy = true, what follows each added token too.
    """

    def __init__(self, path: Path, settings: dict) -> None:
        try:
            self._model = sentencepiece.SentencePieceProcessor(model_file=str(path))
        except (RuntimeError, OSError) as error:
            raise InputError(f"{path}: not a sentencepiece model: {error}") from None
        own = {"bos": self._model.bos_id(), "eos": self._model.eos_id()}
        own |= {"unk": self._model.unk_id(), "pad": self._model.pad_id()}
        self.named = {f"{name}_token": id for name, id in own.items() if id >= 0}
        self.adds_bos = bool(settings.get("add_bos_token", True))
        self._added: dict[str, int] = {}
        self._special: set[int] = set()
        for text in settings["special"]:
            if (id := self._piece(text)) is not None:
                self._added[text] = id
                self._special.add(id)
        for id, token in settings["added"].items():
            for flag in ("lstrip", "rstrip", "single_word"):
                if token.get(flag):
                    raise InputError(
                        f"{path.parent}: the added token {token['content']!r} has {flag}, which "
                        "needs a tokenizer.json"
                    )
            self._added[token["content"]] = id
            if token.get("special"):
                self._special.add(id)
        self.size = max([self._model.vocab_size() - 1, *self._added.values()]) + 1
        self._texts = {id: text for text, id in self._added.items()}
        longest_first = sorted(self._added, key=len, reverse=True)
        self._pattern = re.compile(f"({'|'.join(map(re.escape, longest_first))})")
        self._legacy = bool(settings.get("legacy", False))
        self._mark = self._model.encode(MARK)
        if self._added and self._model.decode(self._mark) != MARK:
            raise InputError(f"{path.parent}: added tokens need a tokenizer.json with this model")

    def encode(self, text: str) -> list[int]:
        if not self._added:
            return self._model.encode(text)
        tokens: list[int] = []
        for i, part in enumerate(self._pattern.split(text)):
            if i % 2:
                tokens.append(self._added[part])
            elif part and (i == 0 or self._legacy):
                tokens += self._model.encode(part)
            elif part:
                tokens += self._model.encode(MARK + part)[len(self._mark) :]
        return tokens

    def decode(self, tokens: list[int]) -> str:
        texts: list[str] = []
        run: list[int] = []
        for token in [*tokens, None]:
            if token is not None and token not in self._texts:
                run.append(token)
                continue
            first = self._legacy or not any(texts)
            texts.append(
                self._model.decode(run)
                if first
                else self._model.decode(self._mark + run).removeprefix(MARK)
            )
            run = []
            if token is not None and token not in self._special:
                texts.append(self._texts[token])
        return "".join(texts)

    def id_of(self, token: str) -> int | None:
        return self._added[token] if token in self._added else self._piece(token)

    def text_of(self, token: int) -> str:
        return self._texts.get(token) or self._model.id_to_piece(token)

    def _piece(self, token: str) -> int | None:
        id = self._model.piece_to_id(token)
        return id if self._model.id_to_piece(id) == token else None


class Tiktoken(Reader):
    def __init__(self, path: Path, settings: dict) -> None:
        tiktoken = _package("tiktoken", path)
        ranks: dict[bytes, int] = {}
        for number, line in enumerate(path.read_bytes().splitlines(), 1):
            try:
                token, rank = line.split()
                ranks[base64.b64decode(token, validate=True)] = int(rank)
            except ValueError as error:
                raise InputError(f"{path}:{number}: not a token and its rank: {error}") from None
        if sorted(ranks.values()) != list(range(len(ranks))):
            raise InputError(f"{path}: its ranks are not 0 to {len(ranks) - 1}, each once")
        self._first = len(ranks)
        names = self._special_names() | {
            id: token["content"] for id, token in settings["added"].items() if id >= self._first
        }
        self._special = {name: id for id, name in names.items()}
        self.size = max(names) + 1
        self._model = tiktoken.Encoding(
            path.parent.name,
            pat_str=LLAMA3_SPLIT,
            mergeable_ranks=ranks,
            special_tokens=self._special,
        )
        self.named = {"bos_token": self._first, "eos_token": self._first + 1}
        self.adds_bos = bool(settings.get("add_bos_token", True))

    def _special_names(self) -> dict[int, str]:
        """LLaMA-3's: what has no name of its own is reserved, counted from 0."""
        names, reserved = {}, 0
        for i in range(LLAMA3_NUM_SPECIAL):
            if i in LLAMA3_SPECIAL:
                names[self._first + i] = f"<|{LLAMA3_SPECIAL[i]}|>"
            else:
                names[self._first + i] = f"<|reserved_special_token_{reserved}|>"
                reserved += 1
        return names

    def encode(self, text: str) -> list[int]:
        return self._model.encode(text, allowed_special="all")

    def decode(self, tokens: list[int]) -> str:
        return self._model.decode([token for token in tokens if token < self._first])

    def id_of(self, token: str) -> int | None:
        try:
            return self._model.encode_single_token(token)
        except KeyError:
            return None

    def text_of(self, token: int) -> str:
        return self._model.decode([token])


def read_settings(folder: Path) -> dict:
    """tokenizer_config.json, completed by the files of older checkpoints.

    `special` are the texts of bos_token and the like, and of additional special tokens; `added` is
    {id: {"content": text, flag: true or false ...}}.
    """
    path = folder / "tokenizer_config.json"
    settings = read_json(path) if path.is_file() else {}
    older = folder / "special_tokens_map.json"
    if older.is_file():
        settings = {**read_json(older), **settings}
    more = [settings.get(key) for key in ("additional_special_tokens", "extra_special_tokens")]
    named = [settings.get(name) for name in NAMED]
    named += [token for tokens in more if isinstance(tokens, list) for token in tokens]
    settings["special"] = [text for text in map(content_of, named) if text is not None]
    added = settings.get("added_tokens_decoder")
    if added is None:
        path = folder / "added_tokens.json"
        texts = read_json(path) if path.is_file() else {}
        special = settings["special"]
        added = {id: {"content": text, "special": text in special} for text, id in texts.items()}
    try:
        settings["added"] = {int(id): {**token} for id, token in added.items()}
        if not all(isinstance(token["content"], str) for token in settings["added"].values()):
            raise TypeError("content is not text")
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path}: its added tokens cannot be read: {error!r}") from None
    return settings


def content_of(token: object) -> str | None:
    """Of a special token as tokenizer_config.json writes it: a text, or a mapping with content."""
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) and token else None


def _settings_id(path: Path, key: str) -> list[int]:
    """The id or ids under a key of a JSON file, [] where there are none."""
    value = read_json(path).get(key) if path.is_file() else None
    return [id for id in (value if isinstance(value, list) else [value]) if type(id) is int]


def _package(name: str, path: Path) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError:
        raise InputError(f"{path}: reading it takes: pip install {name}") from None
