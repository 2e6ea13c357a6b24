"""Decoder layers replayed as CUDA graphs: forward and backward of a training call that comes again and again.

attach      puts the graphs on a model's layers, and takes them off
layer       one layer's calls: eager, captured, or replayed
stack       what the layers of a stack share: who waits for its backward, buffers, what the report says
captured    one captured forward and backward, and the autograd function that replays them
proof       a replay beside eager runs on the user's own batch
recorder    what captures and replays: CUDA graphs, or the same code run again (tests on a CPU)
signature   what a layer's call depends on: module state, parameters, the modes of torch in force
arguments   a call's arguments as tensors, and the rest as a key
buffers     static tensors into which a call's tensors are copied
"""
