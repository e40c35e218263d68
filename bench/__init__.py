"""What is measured, against whom. `python -m bench.operators`, `python -m bench.training`; on a GPU `python -m bench.gpu`."""
