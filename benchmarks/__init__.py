"""What delta tuning costs: `python -m benchmarks --help`."""
