"""The paper's figures and comparisons, one module each."""
