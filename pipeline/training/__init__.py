"""Training: engine (the loop), step, CUDA graph, optimiser, checkpoints and resume, history."""
