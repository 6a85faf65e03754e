"""What every part needs and no method is about: checks, batches, files, guards, progress."""
