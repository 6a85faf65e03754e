"""Mathematics on tensors and arrays that several methods share; it knows no module, no hook and no host."""
