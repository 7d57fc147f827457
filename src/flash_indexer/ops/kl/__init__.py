"""The warm-up loss and its gradients."""
