"""Training objectives: the loss of one optimiser step of the teacher and of the student."""
