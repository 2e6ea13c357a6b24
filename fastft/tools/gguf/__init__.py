"""A GGUF file from base + adapter, and llama.cpp's own answers to it.

families          which families that file format knows, and what it wants done to their tensors
rope              rotary embeddings as metadata
pre_tokenizers    the patterns by which llama.cpp cuts text, by their names
vocabulary        tokenizer and chat template as metadata
writer            the file, tensor by tensor, in F16, BF16 or Q8_0
k_quants          a proven file in K-quants, by llama.cpp
llama_cpp         llama.cpp asked in a process of its own
llama_cpp_worker  that process
"""
