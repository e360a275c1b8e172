"""Training: lanes of folds and seeds, batches, the compiled step, checkpoints and the run directory."""
