"""A stock module beside its candidate.

prove        both on the same random inputs: outputs and every gradient, judged against float64
float64      any stock module run in float64, where its own code casts to float32 too
clone        a copy of a module to run proofs on
proof_sizes  sizes of inputs at which every tiled kernel runs several tiles
tensors      the tensors that a call is given or returns
fingerprint  what a proof depends on, as a key
proof_cache  one proof for each kind, key and device
"""
