"""Converters between checkpoint formats. NumPy only, so that they run on any machine."""
