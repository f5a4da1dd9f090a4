"""What becomes of an adapter after training."""
