"""Evaluation: predictions and scores of finished runs, baselines, few-shot classifiers and significance."""
