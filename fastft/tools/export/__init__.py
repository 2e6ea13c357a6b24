"""`fastft export`: an adapter or a model in the form that a server reads, and proof that it is what was trained.

export       the command's work: stages, proof, publishing
source       what is exported: base, adapter, tokenizer, and the result's tensors
merged       --to merged: a plain 16-bit checkpoint
gguf_file    --to gguf: one file, proven by llama.cpp
ollama       --to ollama: that file and a Modelfile
vllm_lora    --to vllm-lora: the adapter as vLLM reads it
prompts      the texts and conversations that are compared
reference    base + adapter's own answers, and what rounding alone makes of them
proof        llama.cpp's answers beside them
hub          --push-to-hub: the model card and the upload
"""
