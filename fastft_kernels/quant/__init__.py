"""Formats of frozen weights.

weights  a weight in any format: how it is read as a matrix, row block by row block
nf4      4-bit NormalFloat and FP4 as bitsandbytes stores them
int8     8-bit integers with a scale for each row
"""
