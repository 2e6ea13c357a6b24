"""Normalisation layers.

rms_norm        RMSNorm in its variants, with an optional residual addition
layer_norm      LayerNorm
gated_rms_norm  RMSNorm times the activation of a gate, over the whole width or groups of it
"""
