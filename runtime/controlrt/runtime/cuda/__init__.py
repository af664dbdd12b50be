"""What runs bundles on an NVIDIA GPU: device memory, streams, CUDA graphs, and the engines that are launched in them.

Only ``driver`` imports cuda.bindings; everything else works on the ``Device`` protocol.
"""
