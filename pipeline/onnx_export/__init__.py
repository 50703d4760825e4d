"""Export the student as an ONNX graph, check parity with PyTorch, and build the content of a release."""
