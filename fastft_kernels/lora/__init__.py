"""Linear layers with low-rank adapters.

lora_linear  one or more linears over the same input as one autograd function
layout       what a group is apart from its tensors
group        the products of such a group, forward and backward
plain_group  the group's arithmetic where nothing is cast
formula      the same in plain PyTorch, for second derivatives
dropout      dropout that is drawn as torch draws it, and not kept
"""
