"""Second stage of the student: features of the training images, and the classifier that is refitted on them."""
