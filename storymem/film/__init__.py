"""Films: the shot loop, the folder of a film, its page."""
