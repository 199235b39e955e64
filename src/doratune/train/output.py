"""Names of what a run leaves in its output folder."""

METRICS, CURVES, CHECKPOINTS, RECIPE = "metrics.jsonl", "curves.png", "checkpoints", "recipe.toml"
TENSORBOARD = "tensorboard"
