"""bitsandbytes' 8-bit and paged optimizers through a trainer's `optim=`: nothing of ours stands between, and a patched
model trains with them as a stock one does. (On a CPU the paged classes fall back to ordinary memory; that they were
asked to page is what is checked.)"""

import bitsandbytes
import pytest
import torch
from trl import SFTConfig, SFTTrainer

from tests.trainers import harness as h

CLASSES = {  # optim -> is_paged, bits
    "adamw_8bit": (False, 8),
    "adamw_bnb_8bit": (False, 8),
    "paged_adamw_8bit": (True, 8),
    "paged_adamw_32bit": (True, 32),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return h.checkpoint(tmp_path_factory.mktemp("model"))


@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
@pytest.mark.parametrize("optim", CLASSES)
def test_the_argument_reaches_bitsandbytes_and_a_patched_model_trains(folder, tmp_path, optim):
    runs = {}

    def make(way):
        args = h.arguments(SFTConfig, tmp_path, 3, max_length=24, optim=optim, learning_rate=1e-3)
        runs[way] = SFTTrainer(
            model=h.load(folder, way, lora=False), args=args, train_dataset=h.pairs(), processing_class=h.tokenizer()
        )
        return runs[way]

    stock, ours = h.run(make, "stock"), h.run(make, "fastft")
    for trainer in runs.values():
        optimizer = getattr(trainer.optimizer, "optimizer", trainer.optimizer)
        paged, bits = CLASSES[optim]
        assert (
            isinstance(optimizer, bitsandbytes.optim.AdamW)
            and optimizer.is_paged == paged
            and optimizer.args.optim_bits == bits
        )
        # 300 x 32 elements, beyond the 4096 below which states are never 8-bit
        embedding = trainer.model.get_input_embeddings().weight
        states = {
            n: optimizer.state[p]["state1"].dtype
            for n, p in trainer.model.named_parameters()
            if p.numel() > 4096 and p is not embedding
        }
        assert all(d == (torch.uint8 if bits == 8 else torch.float32) for d in states.values())
        assert optimizer.state[embedding]["state1"].dtype == torch.float32
    assert len(ours["losses"].unique()) == 3
    # the same gradients but for rounding; a state's 8 bits may turn rounding into one step of their grid
    assert float((ours["losses"] - stock["losses"]).abs().max()) < 1e-4 * float(stock["losses"].abs().max())
