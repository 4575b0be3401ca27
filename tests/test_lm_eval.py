"""Under lm-evaluation-harness our model gets the harness's own `hf` model's scores, row by row."""

import os
import shutil
from pathlib import Path
from types import ModuleType

import pytest
import torch
from tiny import MIXLORA, add_filled

import mixlora
import models
from mixlora.errors import InputError
from mixlora.tokenizer import Tokenizer

pytestmark = pytest.mark.slow

SHARED = Path(__file__).resolve().parents[2] / "shared/data"
BASE = SHARED / "models/stories260K"
needs_data = pytest.mark.skipif(not SHARED.is_dir(), reason="needs ../shared/data")
ROWS = int(os.environ.get("LM_EVAL_ROWS", "60"))  # of each task
# The harness's tasks arc_easy and piqa, reading rows from files instead of from the hub.
TASKS = {
    "arc_easy_here": (
        "arc-e/test.jsonl",
        'doc_to_text: "Question: {{question}}\\nAnswer:"\n'
        'doc_to_target: "{{choices.label.index(answerKey)}}"\ndoc_to_choice: "{{choices.text}}"\n',
    ),
    "piqa_here": (
        "piqa/validation.jsonl",
        'doc_to_text: "Question: {{goal}}\\nAnswer:"\ndoc_to_target: label\n'
        'doc_to_choice: "{{[sol1, sol2]}}"\n',
    ),
}
TASK = """\
task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {file}
output_type: multiple_choice
test_split: test
{questions}
metric_list:
  - metric: acc
  - metric: acc_norm
"""


@pytest.fixture(scope="module")
def lm_eval(tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    with pytest.MonkeyPatch.context() as patch:
        for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
            patch.setenv(name, "1")
        patch.setenv("HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("datasets")))
        yield pytest.importorskip("lm_eval")


@pytest.fixture(scope="module")
def ours(lm_eval: ModuleType):  # noqa: ANN201
    from mixlora.lm_eval import HarnessModel

    return HarnessModel(models.load(BASE), Tokenizer(BASE), batch_size=8)


@pytest.fixture(scope="module")
def theirs(lm_eval: ModuleType, tmp_path_factory: pytest.TempPathFactory):  # noqa: ANN201
    from lm_eval.models.huggingface import HFLM
    from transformers import LlamaForCausalLM, LlamaTokenizer

    folder = tmp_path_factory.mktemp("hf")
    shutil.copy(BASE / "tokenizer.model", folder)
    tokenizer = LlamaTokenizer.from_pretrained(folder, add_bos_token=True)
    model = LlamaForCausalLM.from_pretrained(BASE, dtype=torch.float32)
    return HFLM(model, tokenizer=tokenizer, batch_size=8, add_bos_token=True, device="cpu")


@needs_data
@pytest.mark.parametrize("name", TASKS)
def test_a_task_scores_as_under_the_harness(
    name: str, lm_eval: ModuleType, ours, theirs, tmp_path: Path
) -> None:
    from lm_eval.tasks import TaskManager

    file, questions = TASKS[name]
    text = TASK.format(name=name, file=SHARED / "tasks" / file, questions=questions)
    (tmp_path / f"{name}.yaml").write_text(text)
    tasks = TaskManager(include_path=str(tmp_path), include_defaults=False)
    both = [
        lm_eval.simple_evaluate(
            harness, tasks=[name], task_manager=tasks, limit=ROWS, bootstrap_iters=0
        )
        for harness in (ours, theirs)
    ]
    largest, count = 0.0, 0
    for mine, other in zip(*(result["samples"][name] for result in both), strict=True):
        assert mine["arguments"] == other["arguments"]
        for (a,), (b,) in zip(mine["resps"], other["resps"], strict=True):
            largest, count = max(largest, abs(a[0] - b[0])), count + 1
            assert a[1] == b[1]
    print(f"{name}: {count} log-likelihoods, largest difference {largest:.1e}")
    assert count >= 2 * len(both[0]["samples"][name]) > 0 and largest < 1e-3
    for metric in ("acc,none", "acc_norm,none"):
        a, b = (result["results"][name][metric] for result in both)
        print(f"{name}: {metric} {a} {b}")
        assert a == b


def requests_of(kind: str, *arguments: tuple) -> list:
    from lm_eval.api.instance import Instance

    return [Instance(kind, {}, values, i) for i, values in enumerate(arguments)]


STORY = "Once upon a time, there was a little girl named Lily. She loved to play outside. "


@needs_data
def test_pairs_texts_and_generations_are_the_harness_own(ours, theirs) -> None:
    """Empty and long contexts, trailing spaces; texts of several windows; several stops."""
    pairs = [
        ("", "Once upon"),
        ("Once upon ", "a time"),
        (STORY * 60, " The end."),
        ("a", " b" * 90),
    ]
    mine, other = (m.loglikelihood(requests_of("loglikelihood", *pairs)) for m in (ours, theirs))
    assert [a[1] for a in mine] == [b[1] for b in other]
    assert [a[0] for a in mine] == pytest.approx([b[0] for b in other], abs=1e-3)

    # Of a text that repeats itself the harness would take two windows for one.
    long = (SHARED / "text/tinyshakespeare.txt").read_text(encoding="utf-8")[:6000]
    texts = [("Once upon a time",), (STORY,), (long,), ("",)]
    rolling = requests_of("loglikelihood_rolling", *texts)
    mine, other = (m.loglikelihood_rolling(rolling) for m in (ours, theirs))
    assert mine == pytest.approx(other, abs=1e-3, rel=1e-6)

    prompts = [
        ("Once upon a time", {"until": ["\n", "Lily"], "max_gen_toks": 60}),
        ("The cat", {"until": ["."], "max_gen_toks": 60, "do_sample": False}),
        ("One day, Tom", {"until": ["."], "max_gen_toks": 60, "do_sample": False}),
        (STORY * 60, {"until": [], "max_gen_toks": 20, "temperature": 0}),
        ("A", {"until": "the"}),
    ]
    generations = requests_of("generate_until", *prompts)
    mine, other = (m.generate_until(generations) for m in (ours, theirs))
    assert mine == other
    assert len(set(mine)) == len(mine) and all(mine[:4])


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"do_sample": True, "temperature": 0.7}, "greedy"),
        ({"num_beams": 4}, "knows no num_beams"),
        ({"max_gen_toks": 192}, "leaves no room"),
    ],
)
def test_what_it_cannot_do_is_refused(
    lm_eval: ModuleType, checkpoint: Path, arguments: dict, message: str
) -> None:
    from mixlora.lm_eval import HarnessModel

    harness = HarnessModel(models.load(checkpoint), Tokenizer(checkpoint))
    with pytest.raises(InputError, match=message):
        harness.generate_until(requests_of("generate_until", ("the cat", arguments)))


def test_generation_halves_its_batch_and_loses_no_row(
    lm_eval: ModuleType, checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    from mixlora.lm_eval import HarnessModel

    harness = HarnessModel(models.load(checkpoint), Tokenizer(checkpoint), batch_size=6)
    prompts = [(" cat" * n, {"until": [], "max_gen_toks": 3 + n // 7}) for n in range(9)]
    requests = requests_of("generate_until", *prompts)
    expected = harness.generate_until(requests)
    forward, sizes = type(harness.model).forward, []

    def fail(model: torch.nn.Module, tokens_BS: torch.Tensor, **more: object) -> torch.Tensor:
        sizes.append(len(tokens_BS))
        if len(tokens_BS) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return forward(model, tokens_BS, **more)

    monkeypatch.setattr(type(harness.model), "forward", fail)
    capsys.readouterr()
    assert harness.generate_until(requests) == expected and len(set(expected)) > 1
    assert max(sizes) == 6
    assert "memory does not suffice for 6 rows at once, but for 3" in capsys.readouterr().err


def test_a_continuation_longer_than_the_model_is_refused(
    lm_eval: ModuleType, checkpoint: Path
) -> None:
    from mixlora.lm_eval import HarnessModel

    harness = HarnessModel(models.load(checkpoint), Tokenizer(checkpoint))
    with pytest.raises(InputError, match=r"^a continuation of \d+ tokens exceeds .* 192$"):
        harness.loglikelihood(requests_of("loglikelihood", ("the", " cat sat" * 100)))


def test_the_active_adapter_is_scored(lm_eval: ModuleType, checkpoint: Path) -> None:
    from mixlora.lm_eval import HarnessModel

    model, tokenizer = models.load(checkpoint), Tokenizer(checkpoint)
    harness = HarnessModel(model, tokenizer)
    bos, *tokens = tokenizer.encode("the cat")
    assert harness.tok_encode("the cat") == harness.tok_encode("the cat", True) == [bos, *tokens]
    assert harness.tok_encode("the cat", False) == tokens
    requests = requests_of("loglikelihood", ("the cat sat", " on a mat"), ("ten", " dogs"))
    base = harness.loglikelihood(requests, disable_tqdm=True)
    add_filled(model, **MIXLORA)
    adapted = harness.loglikelihood(requests, disable_tqdm=True)
    for request, (a, _), (b, _) in zip(requests, base, adapted, strict=True):
        context, continuation = harness._encode_pair(*request.args)
        with torch.no_grad():
            log_prob_SV = model(torch.tensor([context + continuation])).log_softmax(-1)[0]
        places = range(len(context) - 1, len(context) + len(continuation) - 1)
        assert b == pytest.approx(log_prob_SV[places, continuation].sum().item(), abs=1e-4)
        assert abs(a - b) > 0.1
    with mixlora.disable_adapters(model):
        assert harness.loglikelihood(requests, disable_tqdm=True) == base
