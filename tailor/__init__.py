"""The client and the losses for programs that have Tailor installed; its modules never import a top-level `models` there."""
