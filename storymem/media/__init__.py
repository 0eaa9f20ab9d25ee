"""Video and image files as pixels."""
