"""`fastft verify`: stock against patched on this machine, per group of modules and end to end.

runner    the verification of a model or checkpoint, and its table
modules   one module, run as it is and in float64
layers    large models, one decoder layer at a time
precisions  FP8 beside bf16 and NF4: loss and gradients
checkpoint  the verification of a checkpoint, loaded in the precision asked for
"""
