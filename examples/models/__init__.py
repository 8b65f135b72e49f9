"""Networks that the examples fine-tune."""
