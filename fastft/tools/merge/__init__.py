"""`fastft merge`: an adapter merged into its base, weight by weight.

merge          the command's work
adapter_parts  what an adapter's checkpoint holds, and what can be merged
"""
