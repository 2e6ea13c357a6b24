"""Names of other libraries that are not part of their documented interface, and that fastft relies on all the same.
They stand here alone, one file a library; tests/test_compat.py says first, by library and name, which of them a new
version has changed. (What the kernels rely on: fastft_kernels/runtime/compat.py.)

torch_private           tensor subclasses, hooks on saved tensors, the autograd engine, modes, nn.Module, DDP
sharding_private        FSDP2 and DeepSpeed ZeRO: who gathers which parameter, and their hooks
transformers_private    activation checkpointing, attention and experts implementations, collected outputs, the Trainer
peft_private            which adapters of a layer are on
trl_private             the fused LM head
bitsandbytes_private    what rewrites a 4-bit weight
accelerate_private      what its hooks leave on a module
llama_cpp_private       the library below llama.cpp

Three sorts of names are read in place all the same, as a function or a constant for them would say no more:
`_parameters`, `_buffers`, `_modules` and the tables of hooks of an nn.Module (every library's wrapper relies on them,
and calls of a layer read them too often for a detour), `Tensor._version` (PyTorch's notes on in-place operations
describe it) and operators of `torch.ops`, whose leading underscore is part of a name that dispatch modes and exported
programs see. tests/test_compat.py holds these as well, and finds any other private name outside this folder."""
