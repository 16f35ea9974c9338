"""Step engines: one sampling step in torch, ONNX Runtime, TensorRT or TensorRT-RTX."""
