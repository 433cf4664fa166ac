"""How good filled images are, and how ways to fill them compare."""
