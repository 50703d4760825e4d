"""The student as an ONNX graph, its parity with PyTorch, the release folder."""
