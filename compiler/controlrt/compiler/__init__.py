"""The compiler: exported ONNX programs to the programs of a loop that holds nothing that does not belong there."""
