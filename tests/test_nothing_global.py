"""fastft changes nothing but the instances it is given: every attribute of every module, and of every class in them, of
torch, transformers, peft, trl, accelerate and bitsandbytes is the same object before and after importing, patching,
training, unpatching."""

import subprocess
import sys

import pytest

SCRIPT = """
import sys, types, warnings
warnings.simplefilter("ignore")
FIRST = {first!r}
if FIRST == "fastft":
    import fastft
    assert not any(m.split(".")[0] in ("torch", "transformers", "peft", "trl") for m in sys.modules), "imports others"
import torch, transformers, peft, trl, accelerate, bitsandbytes
from transformers import AutoModelForCausalLM, LlamaConfig
from trl import SFTTrainer, DPOTrainer, GRPOTrainer
import fastft
import fastft.api, fastft.loading.fast_model  # what they load in turn is loaded: the snapshots see the same modules

LIBRARIES = ("torch", "transformers", "peft", "trl", "accelerate", "bitsandbytes")
# torch's own running numbers, which any hook and any fake tensor moves
IGNORED = {{"__warningregistry__", "__builtins__", "next_id", "DESCRIBER_NEXT_ID", "cache_hits", "cache_misses"}}

def snapshot():
    found = {{}}
    for name, module in list(sys.modules.items()):
        if name.split(".")[0] not in LIBRARIES or not isinstance(module, types.ModuleType):
            continue
        for key, value in list(vars(module).items()):
            if key in IGNORED:
                continue
            found[name, key] = value
            if isinstance(value, type) and getattr(value, "__module__", "").split(".")[0] in LIBRARIES:
                found.update({{(value, k): v for k, v in list(vars(value).items()) if k not in IGNORED}})
    return found

def model():
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=128, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                         num_attention_heads=2, num_key_value_heads=1)
    m = AutoModelForCausalLM.from_config(config)
    return peft.get_peft_model(m, peft.LoraConfig(r=2, target_modules="all-linear"))

def step(m):
    ids = torch.randint(0, 128, (2, 8), generator=torch.Generator().manual_seed(1))
    loss = m(input_ids=ids, labels=ids).loss
    loss.backward()
    m.zero_grad()
    return loss.item()

m, untouched = model(), model()
step(m); step(untouched)
before = snapshot()
types_before = [type(x) for x in untouched.modules()]
fastft.patch(m)
step(m)
fastft.report(m).to_dict()
middle = snapshot()
assert [type(x) for x in untouched.modules()] == types_before
fastft.unpatch(m)
after = snapshot()
for what, now in (("patching", middle), ("unpatching", after)):
    changed = [k for k, v in before.items() if k not in now or now[k] is not v]
    assert not changed, (what, changed[:20])
    new = [k for k in now if k not in before and isinstance(k[0], type)]
    assert not new, (what, new[:20])
print("same", len(before))
"""


@pytest.mark.parametrize("first", ["fastft", "torch"])
def test_every_attribute_of_every_library_stays(first):
    run = subprocess.run([sys.executable, "-c", SCRIPT.format(first=first)], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    assert int(run.stdout.split()[-1]) > 50_000
