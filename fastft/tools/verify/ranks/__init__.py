"""`fastft verify --nproc N`: some steps of several processes beside one process on the whole batch.

runner      the command: starts the processes, and the table
launch      N processes by torch's own elastic launcher, and what they return
worker      what each process does
batches     the rows of a step, and those of each process
training    the steps in one process: the truth in float64, and how far off stock is
strategies  how a model is wrapped, trained, gathered and resumed: DDP, FSDP2
saving      the saved adapter (or model), and what of it differs from what was trained
checks      a line of the table; comparisons between processes
"""
