"""Evaluation: rewards, asking and counting, evaluations on disk, tables beside the published numbers.
May import all rooms above the trainer: sampling, model, data, verifier, and the top level."""
