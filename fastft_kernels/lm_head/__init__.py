"""The product with the vocabulary and what follows it, without the [tokens, vocabulary] tensor.

linear_cross_entropy  the loss
linear_logprob        log-probabilities of given tokens, entropy and expected logit
linear_logsumexp      log-sum-exp of the logits
tiles                 the logits of some rows, some columns at a time
online_softmax        the kernels that reduce tiles to softmax statistics, and make gradients of tiles
formula               the same in plain PyTorch, for second derivatives
"""
