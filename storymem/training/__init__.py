"""Training of memory adapters: clips become a cache of latents, the cache becomes batches, batches become an adapter.

Nothing is imported here, so that settings can be checked without torch.
"""
