"""Comparing methods on one task: a grid of training runs in an Optuna study, and what it says with intervals."""
