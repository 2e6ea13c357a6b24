"""The experts of a mixture: every token's rows through the matrices of the experts that were chosen for it.

grouped_mm       products of groups of rows, each with a matrix of its own; the only place that calls torch's kernel
routing          rows in the order of their experts, and the weighted sum back to tokens
gating           what stands between the two projections: h of the first product, again in the backward
projection       one projection with its adapters: forward, and the gradients of its parts
grouped_experts  the whole block as one autograd function
"""
