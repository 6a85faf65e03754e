"""Smaller networks from masks: channels by NNI's ``ModelSpeedup`` or our own surgery, layers by ours."""
