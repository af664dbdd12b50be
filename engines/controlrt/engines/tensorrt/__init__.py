"""TensorRT and TensorRT-RTX: compiled ONNX programs to plans, each built in a process of its own."""
