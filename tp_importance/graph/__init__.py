"""What a network is to a pruner: its trace, coupled channels, their cost, and their removal."""
