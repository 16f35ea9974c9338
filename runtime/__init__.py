"""The drop-in for diffusers pipelines: it tells images and steps apart, and drives pruned sampling on any engine."""
