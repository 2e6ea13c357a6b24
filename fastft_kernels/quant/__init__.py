"""Formats of frozen weights.

weights  a weight in any format: how it is read as a matrix, row block by row block
nf4      4-bit NormalFloat and FP4 as bitsandbytes stores them
int8     8-bit integers with a scale for each row; 8-bit weights as a dense matrix
fp8      rows and blocks in e4m3, with their scales
transpose  the transpose of 8-bit values
scaled_product  the products of an FP8 weight in FP8, and their specification
"""
