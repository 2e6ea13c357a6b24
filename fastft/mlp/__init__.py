"""Feed-forward layers.

mlp          recogniser, proof, replacement of gated and plain MLPs
activations  activation functions written out inside another module
"""
