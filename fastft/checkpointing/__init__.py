"""Which activations a step keeps, recomputes, or moves to the host.

policy           what the user asks for
split            how many layers must be recomputed for a step to fit
policy_state     what is in force, and what was measured
controller       the policy at work on one model
stack_forward    one training forward of a stack of layers
layer_stack      the layers that can be recomputed, and the module that calls them
layer_runs       one layer: kept, recomputed, offloaded
embedding_input  the first layer's input, recomputed from token ids
offload          activations in host memory
retry            out of memory in a first step: a lower policy, the same step again
memory_meter     free memory, and bytes that a piece of code keeps for its backward
foreign_hooks    hooks of a user's on a module, which must see what stock shows them
"""
