"""Runs the pipeline over a calibration set and writes down what the layers of UNet and ControlNets see."""
