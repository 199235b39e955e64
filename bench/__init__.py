"""What doratune costs, next to its peers: `python -m bench --help`. How it is measured: docs/speed.md."""
