"""What is learned and its mathematics: backbones, classifier, heads, losses, queues, prior and adjustment arithmetic."""
