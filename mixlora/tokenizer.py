"""Text <-> token ids, by the checkpoint's own sentencepiece model."""

from pathlib import Path

import sentencepiece

from mixlora.errors import InputError


class Tokenizer:
    """`tokenizer.model` of a checkpoint folder. Ids bos_id and eos_id; padding needs no token.

    `num_embeddings` of the model, where it is given, must be enough for every id.
    """

    def __init__(self, folder: str | Path, num_embeddings: int | None = None) -> None:
        path = Path(folder) / "tokenizer.model"
        if not path.is_file():
            raise InputError(f"{path}: no such file (the tokenizer is a sentencepiece model)")
        try:
            self._model = sentencepiece.SentencePieceProcessor(model_file=str(path))
        except (RuntimeError, OSError) as error:
            raise InputError(f"{path}: not a sentencepiece model: {error}") from None
        self.bos_id, self.eos_id = self._model.bos_id(), self._model.eos_id()
        self.vocab_size = self._model.vocab_size()
        if self.bos_id < 0 or self.eos_id < 0:
            raise InputError(f"{path}: the tokenizer has no BOS or no EOS token")
        if num_embeddings is not None and self.vocab_size > num_embeddings:
            raise InputError(
                f"{path}: the tokenizer has {self.vocab_size} tokens, the model {num_embeddings}"
            )

    def encode(self, text: str) -> list[int]:
        """Ids with the leading BOS, without EOS."""
        try:
            return [self.bos_id, *self._model.encode(text)]
        except RuntimeError:  # half a surrogate pair: bytes of the command line that are not UTF-8
            raise InputError(f"the text is not Unicode: {text!r}") from None

    def decode(self, tokens: list[int]) -> str:
        return self._model.decode(tokens)

    def continuation(self, prompt: str, text: str) -> tuple[list[int], list[int]]:
        """(ids of the prompt, ids that `text` adds to it), the two tokenised as one string.

        A tokenizer may join the prompt's last characters with the text's first; what the prompt
        alone and the whole have in common is then the prompt.
        """
        alone, whole = self.encode(prompt), self.encode(prompt + text)
        common = 0
        while common < min(len(alone), len(whole)) and alone[common] == whole[common]:
            common += 1
        return whole[:common], whole[common:]
