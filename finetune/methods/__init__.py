"""Update rules: what is trainable, and what happens to its gradients."""
