"""The zoo: networks of all kinds with random weights, and what is measured on each of them."""
