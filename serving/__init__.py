"""What runs after training: Triton model repository, launcher, client and command line. No torch at run time."""
