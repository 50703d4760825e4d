"""Second stages: refit the classifier of a trained network on its features, which stay as they are."""
