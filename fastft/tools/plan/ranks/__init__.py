"""Training on several GPUs, as `fastft plan --gpus` predicts it for one of them.

strategies  how many ranks, and how they share the work; what each strategy does to the model before a step
fsdp2       torch's own `fully_shard`, on fake tensors, as accelerate applies it
needed      how many GPUs a way to train needs, and what its collectives send
undo        a model as it was before a strategy wrapped it
"""
