"""The mechanism: observe, prove, swap, report. Knows modules and tensors, no kind of swap and no model."""
