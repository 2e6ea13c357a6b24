"""Normalisation layers.

norms        RMSNorm and LayerNorm: recogniser, proof, replacement
gated_norms  norms that multiply by the activation of a gate
"""
