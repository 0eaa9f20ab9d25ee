"""Video and picture files as pixels."""
