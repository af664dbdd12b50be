"""NVIDIA GPUs: the driver, memory, and TensorRT's engines on them."""
