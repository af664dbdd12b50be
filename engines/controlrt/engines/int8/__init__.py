"""Builds in int8: which layers, and whether what comes out is good enough."""
