"""Run the training stages on many machines: Ray and Kubernetes."""
