"""The mechanism: observe, recognise, prove, swap, report. Knows modules and tensors, no kind of module and no model."""
