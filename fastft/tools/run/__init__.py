"""`fastft run`: a training script, unchanged, with its models patched.

runner      starts the script and finds its models
first_step  patches a model at its first training step
"""
