"""`fastft merge`: an adapter merged into its base, weight by weight.

merge          the command's work
adapter_parts  what an adapter's checkpoint holds, and what can be merged
expert_parts   of it, changes to stacks of experts' matrices
"""
