"""A bundle before it runs: what its programs cost, and the plan they run by."""
