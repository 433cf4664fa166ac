"""Pictures of any size and mode: read, filled at the size of a model, written back."""
