"""Training pipeline, from images to artifacts: parameters, data sources, the stages of dvc.yaml, the training engine."""
