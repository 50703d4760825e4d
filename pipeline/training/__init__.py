"""The training loop: engine, step, CUDA graph, optimiser, resume, history."""
