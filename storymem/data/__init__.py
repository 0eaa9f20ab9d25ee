"""From videos to training data: clips, captions, groups, cached latents."""
