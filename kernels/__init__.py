"""Attention kernels: arrays in, arrays out; they know nothing of the model around them."""
