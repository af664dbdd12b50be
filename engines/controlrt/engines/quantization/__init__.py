"""Builds in int8 and fp8: which layers, and whether what comes out is good enough."""
