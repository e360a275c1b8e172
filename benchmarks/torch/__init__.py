"""Plain PyTorch versions of our models and of published ones, which the benchmarks compare with."""
