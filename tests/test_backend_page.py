"""The example of docs/backend.md: it runs as it stands, and what it computes is what the model computes."""

import re
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs/backend.md"


def test_the_example_gives_the_models_own_results(monkeypatch):
    monkeypatch.chdir(ROOT)
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    made = {}
    exec(compile(code, PAGE, "exec"), made)
    for name in ("eager", "graphed"):
        torch.testing.assert_close(made[name], made["expected"], rtol=1e-4, atol=1e-5)
    assert torch.equal(made["tokens"], made["expected_tokens"])
