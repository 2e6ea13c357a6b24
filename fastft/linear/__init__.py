"""Linear layers with adapters, in groups over the same input.

groups         recogniser: which linears form a group
group_forward  a group at work: the first member called computes for all
projection     what one layer computes right now, as the kernels' argument
reading        what a layer is now, read cheaply
group_proof    proof of a group against its stock layers
float8_linear  a frozen layer in FP8: the class, how it is made of a dense one
float8_table   which of its products are in FP8, by shape, from measured times
float8_error   what a group of such layers loses, beside bf16 and NF4
small_layers   the small layers on which the proof runs
"""
