"""The elementwise middle of feed-forward layers.

glu          act(gate) * up, one or two tensors
activation   act(x) alone, and the activations' formulas that glu shares
adapted_glu  glu with the products of the adapters of gate, up and down inside
adapted_mlp  a gated MLP with an adapter on each projection as one function
"""
