"""Losses that compare features, and their memories: GML, class-wise queues, the fused CUDA kernel."""
