"""Packed rows without a dense mask, padded batches without their padding.

packing       the decision, batch by batch, for one model
hooks         where a batch enters the model, and where its layers are called
entrance      the outermost forward: what it was given and what it returns
batch         a batch as a row of documents; a row in parts on several processes
documents     lengths of documents, and the mask that stands for them
attention     attention within documents
backends      which attention kernel runs
interface     attention modules that read a document mask
layer_proof   proof that a layer treats documents as separate rows
model_proof   proof that what a whole model returns does not depend on its padding
lengths       modules whose formula depends on a row's length
padded_rerun  logits and hidden states that are read afterwards, from a second, padded forward
"""
