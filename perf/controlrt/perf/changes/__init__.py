"""What a change between two calls costs the host, and what a second ControlNet costs."""
