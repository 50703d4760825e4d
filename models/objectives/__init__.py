"""What one optimiser step minimises: the teacher's and the student's objective."""
