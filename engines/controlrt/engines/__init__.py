"""Engines: exported ONNX programs to a bundle that one backend runs."""
