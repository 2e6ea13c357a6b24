"""Models that somebody else splits: tensor, expert and context parallelism, transformers' own FSDP2, Accelerate's
loading by one process. Two gloo processes beside one; stock, with the reason, what cannot be fast."""

import re

import pytest

CORE = ["context llama-lora", "lost-masks llama-lora", "ram-efficient-before llama-lora", "native-tp-ep moe-full"]
CORE += ["verify-tp llama-columns", "late-adapter llama-lora"]
REST = ["context-before qwen3-full", "ram-efficient llama-lora", "native-fsdp2 qwen3-full", "native-fsdp2-ep moe-full"]
REST += ["verify-tp llama-full", "verify-tp qwen3-full", "verify-tp+another_seed llama-columns", "verify-tp llama-lora"]
REST += ["verify-tp llama-nf4"]
LAUNCHES = {"loaded": CORE, "loaded-rest": REST}
ALL = [
    pytest.param(launch, job, id=job, marks=[pytest.mark.slow] if launch == "loaded-rest" else [])
    for launch, jobs in LAUNCHES.items()
    for job in jobs
]
APART = "sharded by tensor parallelism"
BOUND = "its forward is bound on the instance"


@pytest.fixture
def found(results, launch, job):
    return results(launch, LAUNCHES[launch])[job]


def of(*prefixes):
    return [p for p in ALL if p.id.startswith(prefixes) and p.id not in REFUSED]


REFUSED = ("verify-tp llama-lora", "verify-tp llama-nf4")


@pytest.mark.parametrize(("launch", "job"), of("context", "ram", "native"))
def test_as_one_process(found, job):
    assert "raised" not in found, found["raised"]
    assert found["ok"], found["worst"]
    assert found["adapters_equal"] and found.get("saved_equal", True)
    first, second = found["ranks"]
    assert first["swapped"] == second["swapped"] and first["stock"] == second["stock"]
    strategy, case = job.split(" ")
    kinds = {"norm": 5 if "llama" in case else 9, "rotary": 2}
    reasons = {kind: reason for kind, _, _, reason in first["stock"]}
    if strategy == "native-tp-ep":
        assert first["swapped"] == kinds | {"norm": 5} and set(reasons) == {"norm", "linear group", "experts", "head"}
        assert APART in reasons["linear group"] and APART in reasons["head"] and BOUND in reasons["norm"]
    elif strategy == "native-fsdp2-ep":
        assert first["swapped"] == kinds | {"linear group": 8, "head": 1} and set(reasons) == {"experts"}
    else:
        assert first["swapped"] == kinds | {"mlp": 2, "linear group": 14, "head": 1} and not reasons
    if "ep" in strategy.split("-"):
        assert "its experts are on several devices" in reasons["experts"]
    if strategy.startswith("context"):
        assert not first["fallbacks"]


@pytest.mark.parametrize(("launch", "job"), of("lost"))
def test_masks_that_context_parallelism_would_drop_are_refused(found):
    """On every process alike, wherever a document begins; a whole row, whose parts have gaps, is none of two."""
    assert "raised" not in found, found["raised"]
    first, second = found["said"]
    assert first == second
    assert "rows were split over processes" in first["notes"]
    assert float(first["whole"]) == pytest.approx(float(first["one"]), rel=1e-6)
    for where in ("inside", "between"):
        assert "the documents of a packed row would see each other" in first[where]
    assert "layers of this model are sliding_attention" in first["window"]


@pytest.mark.parametrize(("launch", "job"), of("late"))
def test_an_adapter_that_no_process_shares_is_named(found):
    assert "raised" not in found, found["raised"]
    (note,) = found["notes"]
    assert re.match("28 parameters that train are in no unit of FSDP2, such as .*lora_A", note)


@pytest.mark.parametrize(("launch", "job"), of("verify"))
def test_verify_by_tensor_parallelism(found, job):
    assert "raised" not in found, found["raised"]
    failed = {x["name"]: x["detail"] for x in found["lines"] if not x["ok"]}
    assert len(found["lines"]) == 9 and bool(failed) == ("+" in job), failed
    if failed:
        assert re.match("rank 1 begins with other values than rank 0: .*lora_A", failed["loaded on all ranks"])
    else:
        (swapped,) = (x["detail"] for x in found["lines"] if x["name"] == "swapped modules")
        assert swapped == "mlp 2, norm 5, rotary 2" and any(APART in n for n in found["notes"])


@pytest.mark.parametrize(("launch", "job"), [p for p in ALL if p.id in REFUSED])
def test_what_stock_cannot_train_by_tensor_parallelism_is_one_line(found):
    """PEFT 0.21's adapters on layers split by rows, and on 4-bit weights."""
    last = found["raised"].strip().splitlines()[-1]
    assert "ProcessesError: verify: --strategy tp: stock cannot train this model so (" in last and "--no-lora" in last
