"""The claims of the paper as commands: one module each, and what they share."""
