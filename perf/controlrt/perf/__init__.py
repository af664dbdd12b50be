"""Benchmarks: what the compiler and the runtime give, measured beside their peers on one machine."""
