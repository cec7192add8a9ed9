"""Bits where they pay: what few bits in each place cost in accuracy, what more would cost, and the best of them."""
