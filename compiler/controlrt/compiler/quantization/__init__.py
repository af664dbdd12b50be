"""int8 and fp8: which layers there are, what their inputs were seen to be, and the scales that follow from it."""
