"""docs/extending.md holds what it says: each of its changes, made in one file of a copy, works."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
CHANGES = re.findall(
    r"At the end\s+of\s+`([\w/.]+)`:\n\n```python\n(.*?)```",
    (ROOT / "docs/extending.md").read_text(),
    re.DOTALL,
)

PROGRAM = """
import torch
import mixlora
from mixlora import AdapterConfig
from tests.tiny import some_tokens, tiny_model

torch.manual_seed(0)
model = tiny_model().train()
mixlora.add_adapter(model, AdapterConfig(r=4, **{settings}))
tokens_BS = some_tokens(4, 12)
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
losses = []
for model.gradient_checkpointing in (False, True) * 5:
    loss, num_labels = model(tokens_BS, labels_BS=tokens_BS)
    losses.append(loss.item())
    optimizer.zero_grad()
    (loss / num_labels + model.router_loss()).backward()
    optimizer.step()
assert losses[-1] < losses[0], losses
assert all(p.grad.any() for p in model.parameters() if p.requires_grad)
mixlora.save_adapter(model, "adapter")
other = tiny_model()
mixlora.load_adapter(other, "adapter")
assert torch.equal(other(tokens_BS), model.eval()(tokens_BS))
print(mixlora.__file__)
"""
SETTINGS = {
    "mixlora/layers/router.py": {"routing_strategy": "mixlora-sigmoid"},
    "mixlora/ops/shared_glu.py": {"routing_strategy": "mixlora", "act_fn": "relu2"},
}


def test_every_change_is_tried() -> None:
    assert {path for path, _ in CHANGES} == set(SETTINGS)


@pytest.mark.slow
@pytest.mark.parametrize("path, code", CHANGES, ids=[path for path, _ in CHANGES])
def test_a_change_in_one_file(path: str, code: str, tmp_path: Path) -> None:
    for folder in ("mixlora", "models", "tests"):
        shutil.copytree(ROOT / folder, tmp_path / folder)

    def run() -> subprocess.CompletedProcess:
        program = PROGRAM.replace("{settings}", repr(SETTINGS[path]))
        return subprocess.run(
            [sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True
        )

    before = run()
    assert before.returncode and "InputError" in before.stderr  # it is not there yet
    with open(tmp_path / path, "a") as file:
        file.write(f"\n\n{code}")
    after = run()
    assert after.returncode == 0, after.stderr[-2000:]
    assert str(tmp_path) in after.stdout
