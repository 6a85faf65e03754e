"""Networks that are drawn at random: hypothesis draws a program, and shrinks it where something is wrong."""
