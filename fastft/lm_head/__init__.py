"""The language model's head.

head              recogniser, proof, replacement
lazy_logits       makes the tensor that stands for the logits; what it answers without making them
lazy_logits_type  its type, and the calls that keep it lazy: scaling, caps, casts, positions
lazy_tensor       tensors whose value is computed when something needs it
lazy_rows         results by token that are still to be computed: log-probability, entropy
lazy_divergences  divergences between two distributions over the vocabulary
lazy_autograd     requires_grad, grad_fn, hooks and the like of a lazy tensor
lazy_graph        the place of lazy tensors in autograd's graph
product           hidden @ weight.T (+ bias), and what is computed from it in tiles
trl_head          the fused head of TRL's trainers
trl_head_proof    its proof
liger             models that Liger has patched are refused
"""
