"""What `python -m benchmarks` measures, one module per benchmark."""
