"""Ray and Kubernetes: the training stages on many machines."""
