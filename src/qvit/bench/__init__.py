"""Measurements: the engine beside its peers."""
