"""Mixture-of-experts layers.

experts    recogniser of experts in 3-D parameters, and of PEFT's wrappers around them
structure  which parameters, which way round, which gate
layer      the replacement, and the adapters as they are at a call
proof      a small stand-in, stock beside the candidate
"""
