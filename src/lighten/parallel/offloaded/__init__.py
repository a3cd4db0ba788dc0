"""Optimiser state and weights that wait in main memory or in a file, instead of on the device."""
