"""Networks and their mathematics: backbones, classifier, heads, losses, queues, class prior and logit adjustment."""
