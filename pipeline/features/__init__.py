"""Features of a frozen encoder: computed once per image, stored in shards, loaded as a split for training."""
