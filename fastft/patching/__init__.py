"""Patching one model. Knows modules and tensors, no kind of module and no model.

observe             one forward of the stock model on the meta device: what each module was given
stand_ins           what answers for a module in that forward
twins               layers of a list that are alike: one of them is looked at for all
observation_inputs  the tokens and patches that it is given
kind                what a kind of module is to the patcher: a recogniser, and the candidates it answers with
patcher             recognise, prove and swap over all modules of a model, and the exact undo
moved               a model that was moved, cast or sharded since: proven again before its next forward
sharded             a model that FSDP2 or ZeRO-3 shards, as its forwards see it; the same swaps on every process
float32_adapters    a quantised model that trains in float16: its adapters in float32
entrances           the modules through which a forward may enter
report              what runs where, and why
"""
