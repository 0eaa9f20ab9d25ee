"""The command line: Hydra, overrides, and the measurement of speed at true size."""
