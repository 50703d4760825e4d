"""Client and AsyncClient, priors, images, predictions."""
