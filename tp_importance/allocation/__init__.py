"""From loss curves to widths under a budget."""
