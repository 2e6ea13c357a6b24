"""`FastModel.from_pretrained`: a stock model with its adapter, loaded as a stock script loads it, then patched.

fast_model   the entry point
checkpoint   what a name or folder means: adapter, base, configuration, class
precision    device, dtype and quantisation
fp8          linear layers in FP8: of a dense checkpoint, or of one in FP8
adapter      a new adapter, or a saved one
mistakes     what callers get wrong, answered in one line
"""
