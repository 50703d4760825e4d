"""Drift (label shift): estimate the class shares of the live requests from logged logits."""
