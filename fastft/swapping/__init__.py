"""Changing one instance, reversibly, and what a changed instance asks at each call.

swap            the instance's class becomes a subclass of a mixin and the stock class; the exact undo
rebind          another free function for a forward to call, for one class of instances
unchanged       what was read off a module at the patch, compared at the call
walk            the modules and parameters below a module, as lists
stock_only      calls that only stock's code can take (torch.func, forward-mode gradients)
out_of_memory   errors for want of memory, which say nothing about a module
release_memory  who can free memory when a function runs out of it
"""
