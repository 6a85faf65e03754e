"""CATRO: class-aware channel selection by trace ratio (arXiv 2110.10921)."""
