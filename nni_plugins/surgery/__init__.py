"""Smaller networks from masks: channels by NNI's ``ModelSpeedup``, layers by our own removal."""
