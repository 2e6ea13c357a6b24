"""Kernels with hand-derived backward passes. Depends on torch and, where it exists, Triton; knows nothing of
transformers."""
