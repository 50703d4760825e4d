"""Prepare training: create a project, write its first params, check and pack the data, estimate GPU memory."""
