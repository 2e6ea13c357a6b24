"""How many examples hypothesis draws: on a GPU and in the interpreter few, as each new shape is compiled or interpreted
there; the references, which run elsewhere, take many."""

import torch

from fastft_kernels.runtime.dispatch import INTERPRETED


def examples(few: int, many: int) -> int:
    return few if INTERPRETED or torch.cuda.is_available() else many
