"""Training: identity with TRL, the catalogue under the trainer, the contract with TRL, a loop by hand."""
