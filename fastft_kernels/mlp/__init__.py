"""The elementwise middle of feed-forward layers.

glu         act(gate) * up, one or two tensors
activation  act(x) alone, and the activations' formulas that glu shares
"""
