"""Scorers: pictures, clips and texts become embeddings or scores.

Nothing is imported here, so that a film without a quality filter loads no transformers:

- `storymem.scorers.clip.ClipScorer`: image and text embeddings (keyframe selection, aesthetics).
- `storymem.scorers.viclip.ViclipScorer`: clip and text embeddings (prompt following, consistency).
- `storymem.scorers.quality.QualityScorer`: what a quality filter is; `NoQuality` lets every frame pass.
- `storymem.scorers.aesthetic.AestheticScorer`: LAION aesthetic score, V1 and V2.
- `storymem.scorers.hpsv3.Hpsv3Scorer`: human preference score, version 3.

One contract for all: pictures are float tensors in 0..1, RGB, [N, 3, H, W] (clips [B, T, 3, H, W]); results
are float32 on the CPU, one row per picture, clip or text, and an empty input gives an empty result.
"""
