"""What `classifier` writes to disk: access log, logits, unknown images. Files are copied into the model repository as well."""
