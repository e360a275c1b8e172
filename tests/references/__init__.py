"""What published systems answer, and how their weights become ours: one module per parity file."""
