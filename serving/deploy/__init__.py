"""Deployers: each makes the running set of workers equal to the plan."""
