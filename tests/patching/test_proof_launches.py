"""Every Triton kernel that a training step launches, with the same branches and dtypes, was launched by a proof of the
patch before it. Run in Triton's interpreter, in which most kernels are only noted: what they would compute is not
asked, so every verdict is taken as good."""

import os
import subprocess
import sys

import pytest

SCRIPT = """
import sys
from dataclasses import replace

import torch
from triton.runtime import interpreter

seen = {"proofs": {}, "step": {}}
phase = "proofs"
launch = interpreter.GridExecutor.__call__
COMPUTED = ("_glu_fwd_kernel", "_glu_bwd_kernel", "fwd_kernel")  # their results decide what is recognised


def noted(self, *args, **kwargs):
    bound = dict(zip(self.arg_names, args)) | {k: v for k, v in kwargs.items() if k in self.arg_names}
    how = {
        n: str(v.dtype) if hasattr(v, "data_ptr") else v if v is None or n in self.constexprs else "number"
        for n, v in bound.items()
    }
    seen[phase].setdefault((self.fn.__name__, tuple(how.items())), 0)
    seen[phase][self.fn.__name__, tuple(how.items())] += 1
    return launch(self, *args, **kwargs) if self.fn.__name__ in COMPUTED else None


interpreter.GridExecutor.__call__ = noted
import fastft
from fastft.lm_head import trl_head
from fastft.linear import group_proof, groups
from fastft.patching import patcher
from fastft.proving import proof_cache, prove
from tests.linear.lora_models import adapted, llama, quantised

proof_of = proof_cache.proof_of


def taken_as_good(kind, key, device, run):
    return proof_of(kind, key, device, lambda: replace(run(), ok=True, reason=""))


class Good:
    ok, error, eager_error, reason = True, 0.0, 0.0, ""

    def __bool__(self):
        return True


for module in (patcher, groups, trl_head):
    module.proof_of = taken_as_good
for module in (prove, group_proof):
    module.compare = lambda *args, **kwargs: Good()
    module.agree = lambda *args, **kwargs: ""
prove._close = lambda a, b: a.shape == b.shape
matrix = group_proof._matrix
group_proof._matrix = lambda base, dtype: (matrix(base, dtype)[0], "")

model = llama(vocab_size=32000, layers=1, hidden_size=64, intermediate_size=96, max_position_embeddings=512)
ways = {"lora": lambda: adapted(model, dropout=0.1), "nf4": lambda: adapted(quantised(model)), "full": lambda: model}
model = ways[sys.argv[1]]()
fastft.patch(model.train())
phase = "step"
ids = torch.randint(3, 32000, (2, 150))
model(input_ids=ids, labels=ids, attention_mask=torch.ones_like(ids), use_cache=False).loss.backward()
report = fastft.report(model)
assert not report.stock and not report.fallbacks, report
assert {r.kind for r in report.swapped} >= {"norm", "rotary", "mlp", "head"}
assert len(seen["step"]) >= 8, list(seen["step"])
for name, how in seen["step"]:
    if (name, how) not in seen["proofs"]:
        near = [dict(h) for n, h in seen["proofs"] if n == name]
        print("MISSING", name, [{k: (v, h.get(k)) for k, v in how if h.get(k) != v} for h in near])
print("kernels", len(seen["step"]), len(seen["proofs"]))
"""


@pytest.mark.parametrize("way", ["lora", "nf4", "full"])
def test_what_a_step_launches_was_proven(way):
    env = {**os.environ, "TRITON_INTERPRET": "1", "HF_HUB_OFFLINE": "1"}
    run = subprocess.run([sys.executable, "-c", SCRIPT, way], capture_output=True, text=True, env=env, check=False)
    assert run.returncode == 0, run.stderr[-3000:]
    assert "MISSING" not in run.stdout and "kernels" in run.stdout, run.stdout
