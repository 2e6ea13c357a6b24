"""`fastft verify --nproc N`: some steps of several processes beside one process on the whole batch.

runner      the command: starts the processes, and the table
launch      N processes by torch's own elastic launcher, and what they return
process     what a new process is started with
worker      what it does
job         what is verified, and a line of what is found
batches     the rows of a step, and those of each process
training    the steps in one process: the truth in float64, and how far off stock is
strategies  how a model is wrapped, trained, gathered and resumed: DDP, FSDP2
zero        the same for DeepSpeed ZeRO-2 and ZeRO-3
saving      the saved adapter (or model), and what of it differs from what was trained
checks      comparisons by the judge, and between processes
diagnosis   what is wrong where losses or gradients differ
"""
