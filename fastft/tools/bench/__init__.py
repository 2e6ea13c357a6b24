"""`fastft bench`: stock, its best flags, the peers and fastft on this machine, each in a process of its own.

runner    starts the processes, gathers their rows, makes the table
spec      what one process is told, and the data that all of them train on
worker    one stack in its process: the numeric gate, then the timed cells
stacks    how each stack loads the model
cells     the trainers of the cells: sft, packed, long, dpo, grpo
steps     gradients for the gate; time, tokens and memory of the timed steps
timing    timers for CPU and GPU, the measured roof of the device
limits    the physical limit of a LoRA step
machine   device, versions and the model's shape
fp8       `--fp8`: the products of each shape, as a table to load by
plot      speed.png, memory.png, length.png
"""
