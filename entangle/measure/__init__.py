"""The kernel that commands and training share: a pass over pairs gives rows of numbers."""
