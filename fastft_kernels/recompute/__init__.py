"""What a backward computes again in place of keeping it.

recomputation  a tensor that its consumer can recompute from what its producer saves anyway
replay         the second run of a checkpointed function, which may leave out what no gradient needs
"""
