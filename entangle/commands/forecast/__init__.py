"""`entangle forecast`: training curves from a Gram matrix."""
