"""Normalisation layers.

norms        RMSNorm and LayerNorm: their formulas and replacement
recogniser   which modules are norms, and of which formula; their proof
gated_norms  norms that multiply by the activation of a gate
"""
