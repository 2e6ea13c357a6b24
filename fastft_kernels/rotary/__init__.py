"""Rotary position embedding.

rope          rotates queries and keys, halves or neighbouring pairs
rope_kernels  its kernel, and how heads and channels lie in memory
"""
