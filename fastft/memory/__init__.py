"""Activation policy, lean recomputation, packed and padded batches: what a step keeps, and what it computes again."""
