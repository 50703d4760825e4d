"""Models of Triton's python backend. Each file is copied into the model repository and runs there without Tailor.

Triton runs each instance in an inference process, its "stub" (triton_python_backend_stub).
"""
