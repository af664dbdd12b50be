"""The ways to draw a picture that are compared, each in a process of its own."""
