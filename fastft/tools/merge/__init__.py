"""`fastft merge`: an adapter merged into its base, weight by weight.

merge          the command's work
merge_plan     what is written, tensor by tensor
adapter_parts  what an adapter's checkpoint holds, and what can be merged
expert_parts   of it, changes to stacks of experts' matrices
base           where the base lies, its tensors, and whether it is the one that was trained on
reference      base + adapter as plain transformers and PEFT run them
precision      whether the adapter was trained on the base in 4 bits
"""
