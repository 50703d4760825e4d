"""A run, from images to artifacts: parameters, data sources, the stages of dvc.yaml and the training engine."""
