"""Whether operators can trust the daemon, measured on the real one: `python -m benchmarks.trust`."""
