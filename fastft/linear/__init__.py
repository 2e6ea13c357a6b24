"""Linear layers with adapters, in groups over the same input.

groups         recogniser: which linears form a group
group_forward  a group at work: the first member called computes for all
projection     what one layer computes right now, as the kernels' argument
reading        what a layer is now, read cheaply
group_proof    proof of a group against its stock layers
small_layers   the small layers on which the proof runs
"""
