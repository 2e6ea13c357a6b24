"""`fastft plan`: the peak memory of a training step, predicted from the configuration alone on fake tensors.

planner     `plan`: the lines of fastft and of stock, and the policy that "auto" would choose
result      what `plan` returns, as a table, JSON and a picture
predict     the peak of one step at any depth, from runs of a few layers
step        the training step that is run on fake tensors
fake        the model on fake tensors, quantised weights included
fake_ops    operators on fake tensors, remembered
measure     every allocation of a step, and the extrapolation over layers
workspace   memory that operators allocate inside
optimizers  the states of each optimizer
search      the largest batch and the longest row that fit
gpus        the memory of known cards
ranks       several GPUs: what one rank of a strategy holds and sends
"""
