"""Load tests with Locust: options, prepared requests, senders, load shapes, thresholds."""
