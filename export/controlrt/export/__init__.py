"""Export: a diffusers checkpoint and its ControlNets to checked ONNX programs."""
