"""Names of what a run leaves in its output folder."""

METRICS, CURVES, RESULTS, RECIPE = "metrics.jsonl", "curves.png", "results.json", "recipe.toml"
CHECKPOINTS, TENSORBOARD = "checkpoints", "tensorboard"
