"""Public client and losses for programs that install Tailor; in the wheel they never import a top-level `models` package."""
