"""Normalisation layers.

rms_norm        RMSNorm in its variants; rms_norm_kernels: its Triton kernels
layer_norm      LayerNorm; layer_norm_kernels: its Triton kernels
gated_rms_norm  RMSNorm times the activation of a gate, over the whole width or groups of it
"""
