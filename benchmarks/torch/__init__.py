"""Our models, and the published ones, restated in plain PyTorch: what the benchmarks compare with."""
