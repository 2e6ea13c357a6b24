"""What the command line runs, each callable from Python as well.

bench/        `fastft bench`
demo/         `fastft demo`
merge/        `fastft merge`
plan/         `fastft plan`
run/          `fastft run`
verify/       `fastft verify`
report        `fastft report`: what would be swapped, from a model's configuration alone
new_folder    a folder that appears whole or not at all
gate          losses and gradients against a high-precision run: the accuracy check before anything is timed
peak          the most memory that training takes, as it is measured
shard_writer  a safetensors file written tensor by tensor
tokenizer     the tokenizer of a checkpoint, as every command loads it
"""
