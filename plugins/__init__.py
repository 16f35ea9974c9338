"""The token operators, gather and scatter of token rows, in torch and in ONNX."""
