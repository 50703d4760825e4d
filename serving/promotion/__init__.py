"""A version goes live, or is rolled back; rehearsal; history."""
