"""Features of texts: sentences of each class, text encoders, and the stored features that training uses as centres."""
