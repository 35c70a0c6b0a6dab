"""Normalisers, corpus-level scores with signatures and intervals, normalised performance, the table of results."""
