"""The server scenario: requests that arrive at random at a running ``controlrt serve``."""
