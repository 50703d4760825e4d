"""Labels: images that may be labelled wrongly, and unlabelled images whose labels help the small classes most."""
