"""Laws of the losses, over the whole catalogue."""
