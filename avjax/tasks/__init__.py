"""What a model predicts: kinds of tasks, losses and metrics."""

from avjax.tasks.scoring import ONE_CLASS, SCORINGS, Scoring, encoded, prior
