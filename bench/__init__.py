"""What is measured, against whom: `python -m bench.operators` and `python -m bench.training`; on a machine
with a GPU `python -m bench.gpu`, which builds, tests and measures everything."""
