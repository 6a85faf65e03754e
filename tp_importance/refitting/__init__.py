"""Least-squares repair of the layers behind removed channels."""
