"""A model of ours under lm-evaluation-harness (EleutherAI, `pip install lm_eval`).

    harness = HarnessModel(model, tokenizer)
    lm_eval.simple_evaluate(harness, tasks=["arc_easy", "piqa"])

It scores as the harness's own `hf` model does: the same tokens of context and continuation, the
same windows, BOS before everything. The model's active adapter, or none, is what is scored.
"""

import functools
import itertools
from collections.abc import Sequence

try:
    from lm_eval import utils
    from lm_eval.api.instance import Instance
    from lm_eval.api.model import TemplateLM
    from lm_eval.models.utils import normalize_gen_kwargs
except ImportError:
    raise ImportError("mixlora.lm_eval needs lm-evaluation-harness: pip install lm_eval") from None

from mixlora.errors import InputError
from mixlora.evaluation import generate_text, log_probs_after
from mixlora.faults import in_batches
from mixlora.layers.adapted_model import AdaptedModel
from mixlora.metrics import Progress
from mixlora.tokenizer import Tokenizer

# (the two texts, or None; tokens of the context; tokens of the continuation)
Request = tuple[tuple[str, str] | None, list[int], list[int]]


class HarnessModel(TemplateLM):
    """The base class makes tokens of texts, by `tok_encode`; here they are scored."""

    def __init__(self, model: AdaptedModel, tokenizer: Tokenizer, batch_size: int = 32) -> None:
        super().__init__()
        self.model, self._tokenizer, self.batch_size = model, tokenizer, batch_size
        self.max_length = model.config.max_position_embeddings

    @property
    def eot_token_id(self) -> int:
        return self._tokenizer.eos_id

    @property
    def prefix_token_id(self) -> int:
        return self._tokenizer.bos_id

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: object
    ) -> list[int]:
        tokens = self._tokenizer.encode(string)
        return tokens[1:] if add_special_tokens is False else tokens

    def _loglikelihood_tokens(
        self, requests: Sequence[Request], disable_tqdm: bool = False, **kwargs: object
    ) -> list[tuple[float, bool]]:
        """Each continuation's log-probability, and whether greedy decoding would have written it.

        What is too long loses the beginning of its context.
        """
        runs = []
        for _, context, continuation in requests:
            if len(continuation) > self.max_length:
                raise InputError(
                    f"a continuation of {len(continuation)} tokens exceeds the model's "
                    f"max_position_embeddings {self.max_length}"
                )
            tokens = (context + continuation)[-self.max_length - 1 : -1]
            runs.append((tokens, len(tokens) - len(continuation)))
        answers: list[tuple[float, bool]] = [(0.0, True)] * len(runs)
        progress = None if disable_tqdm else Progress("lm-eval", len(runs), "continuations")
        for i, log_prob_PV in log_probs_after(self.model, runs, self.batch_size):
            continuation = requests[i][2]
            log_prob = sum(log_prob_PV[range(len(continuation)), continuation].tolist())
            answers[i] = (log_prob, log_prob_PV.argmax(-1).tolist() == continuation)
            if progress:
                progress.advance()
        if progress:
            progress.close()
        return answers

    def loglikelihood_rolling(
        self, requests: Sequence[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """Of whole texts, in windows that do not overlap; BOS is scored like any other token."""
        windows: list[Request] = []
        owners = []
        for i, request in enumerate(requests):
            (text,) = request.args
            for window in utils.get_rolling_token_windows(
                self.tok_encode(text), self.prefix_token_id, self.max_length, context_len=1
            ):
                windows.append((None, *utils.make_disjoint_window(window)))
                owners.append(i)
        totals = [0.0] * len(requests)
        scored = self._loglikelihood_tokens(windows, disable_tqdm)
        for i, (log_prob, _) in zip(owners, scored, strict=True):
            totals[i] += log_prob
        return totals

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        """Greedy text, batched where stops and lengths agree; sampling is refused."""
        prompts = [self.tok_encode(request.args[0]) for request in requests]
        settings = [_generation(request.args[1]) for request in requests]
        order = sorted(range(len(requests)), key=lambda i: (settings[i], len(prompts[i])))
        texts = [""] * len(requests)
        progress = None if disable_tqdm else Progress("lm-eval", len(requests), "generations")
        for how, group in itertools.groupby(order, settings.__getitem__):
            work = functools.partial(self._generate, prompts, *how)
            batches = in_batches([*group], self.batch_size, work, self.model.is_sharded)
            for batch, generated in batches:
                for i, text in zip(batch, generated, strict=True):
                    texts[i] = text
                if progress:
                    progress.advance(len(batch))
        if progress:
            progress.close()
        return texts

    def _generate(
        self,
        prompts: Sequence[list[int]],
        stop: tuple[str, ...],
        max_new_tokens: int,
        batch: Sequence[int],
    ) -> list[str]:
        room = self.max_length - max_new_tokens
        if room < 1:
            raise InputError(
                f"max_gen_toks {max_new_tokens} leaves no room for a prompt in the model's "
                f"max_position_embeddings {self.max_length}"
            )
        cut = [prompts[i][-room:] for i in batch]
        return generate_text(self.model, self._tokenizer, cut, max_new_tokens, stop)


def _generation(arguments: dict) -> tuple[tuple[str, ...], int]:
    """(stop strings, most new tokens) of a request; what asks for anything else is refused."""
    values = normalize_gen_kwargs(arguments, default_max_gen_toks=256)
    stop, max_new_tokens = values.pop("until"), values.pop("max_gen_toks")
    if values.pop("do_sample", False) or values.pop("temperature", 0.0):
        raise InputError(f"generate_until is greedy here, got {arguments}")
    if values:
        raise InputError(f"generate_until knows no {', '.join(values)}")
    return tuple(word for word in stop if word), max_new_tokens
