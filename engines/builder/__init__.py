"""TensorRT and TensorRT-RTX plans: built in a process of their own, streamed to disk, reported on."""
