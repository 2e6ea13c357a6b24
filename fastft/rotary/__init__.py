"""Rotary position embedding.

rotary  recogniser, proof, replacement of the function that rotates queries and keys
"""
