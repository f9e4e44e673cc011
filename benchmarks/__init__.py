"""How fast, beside whom: every figure is a ratio measured in one run. `make bench` runs all of it."""
