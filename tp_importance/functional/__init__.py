"""Pure mathematics of the methods: tensors in, tensors out; no host, no hook, no module."""
