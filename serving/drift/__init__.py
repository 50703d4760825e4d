"""Class shares estimated from logged logits."""
