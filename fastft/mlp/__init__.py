"""Feed-forward layers.

mlp          the replacement of gated and plain MLPs
recogniser   which modules are MLPs; their proof
activations  activation functions written out inside another module
"""
