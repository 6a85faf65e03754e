"""The command line: networks by name, folders of images, and the calls of the Python interface."""
