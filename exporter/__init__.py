"""From a diffusers checkpoint to `step.onnx`: interception, tracing, MACs, and the CLI `cat-export`."""
