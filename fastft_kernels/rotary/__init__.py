"""Rotary position embedding.

rope  rotates queries and keys, halves or neighbouring pairs
"""
