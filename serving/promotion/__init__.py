"""Promote a version to champion or roll back to an older one; check, rehearsal, swap, history."""
