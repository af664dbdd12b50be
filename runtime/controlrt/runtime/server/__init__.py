"""The server: many requests drawn together, step by step, and the interfaces that clients know."""
