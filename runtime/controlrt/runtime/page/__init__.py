"""Pages of HTML that open without a network: what results and statistics are shown on."""
