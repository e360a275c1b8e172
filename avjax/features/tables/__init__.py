"""Precomputed features in tables."""
