"""A page about runs: what is compared, how it is drawn, what it looks like."""
