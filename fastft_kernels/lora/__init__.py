"""Linear layers with low-rank adapters.

lora_linear  one or more linears over the same input as one autograd function
group        the products of such a group, forward and backward
formula      the same in plain PyTorch, for second derivatives
dropout      dropout that is drawn as torch draws it, and not kept
"""
