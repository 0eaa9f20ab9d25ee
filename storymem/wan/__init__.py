"""Wan2.2 with memory: rotary embedding, conditioning, pipeline, sampler, adapters, loading."""
