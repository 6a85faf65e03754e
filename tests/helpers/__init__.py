"""What several tests need; imported as ``from helpers.networks import ...``."""
