"""Backbones of one's own: each module that is imported here tells timm of its models (`timm.models.register_model`).

Whoever asks timm for a name imports this first (docs/extending.md).
"""
