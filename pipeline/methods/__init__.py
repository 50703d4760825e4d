"""Methods of the paper's tables by name, and their comparison on one data set with one recipe (`tailor methods`)."""
