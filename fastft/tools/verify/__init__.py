"""`fastft verify`: stock against patched on this machine, per group of modules and end to end.

runner    the verification of a model or checkpoint, and its table
modules   one module, run as it is and in float64
layers    large models, one decoder layer at a time
"""
