"""Diffusers checkpoints: where they come from, how they are loaded, and adapters fused into their weights."""
