"""Models of Triton's python backend. Each file is copied into the model repository and runs there without Tailor."""
