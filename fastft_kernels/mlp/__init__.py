"""The elementwise middle of feed-forward layers.

glu          act(gate) * up, one or two tensors
rounded_glu  glu whose result is also rounded to e4m3, for a product in FP8
activation   act(x) alone, and the activations' formulas that glu shares
adapted_glu  glu with the products of the adapters of gate, up and down inside
adapted_mlp  a gated MLP with an adapter on each projection as one function
"""
