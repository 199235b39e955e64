"""Imported before everything else by `python -m bench`: what is not installed is one message, not a traceback."""

from doratune.extras import installed

if missing := [name for name in ("matplotlib", "peft", "psutil", "transformers") if not installed(name)]:
    raise SystemExit(f"error: the benchmarks need {', '.join(missing)}, which pip install '.[dev]' brings")
